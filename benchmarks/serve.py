"""`python -m benchmarks serve`: what the service promises, measured on real processes.

Every part starts servers of its own and talks HTTP to them. Timings are compared within one run.
"""

from __future__ import annotations

import asyncio
import math
import os
import random
import signal
import statistics
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from tqdm import tqdm

from benchmarks.processes import descriptors, memory, proportional_memory
from benchmarks.reports import check_mergeable, part_of_report, save
from benchmarks.serve_figures import latencies, percentiles, summary, tail_ratios, wilson
from benchmarks.serve_load import Loader
from codedinvnet.bench.load import Client, Reply, connect, server
from codedinvnet.codes.build import scheme_for
from codedinvnet.data import ImageSource
from codedinvnet.errors import UserError
from codedinvnet.evaluation.accuracy import evaluate
from codedinvnet.evaluation.cost import median_ms
from codedinvnet.files import check_writable
from codedinvnet.models.bundle import Bundle, load_bundle, weights_digest
from codedinvnet.provenance import describe_machine
from codedinvnet.serving.served import IMAGES
from codedinvnet.serving.workers.computing import OUTPUT, BundleSpec, Computer
from codedinvnet.serving.workers.local import ProcessPool
from codedinvnet.serving.workers.pool import Task
from codedinvnet.stages import evaluation_images

SCHEMA = 1
SAME = 1e-5
"""Largest difference of a direct answer's probabilities from the offline ones."""
HELD_MS, HELD_SHARE = 100.0, 0.1
"""The paper's delay model (Dinh & Lee, section 4.3)."""
HOLD = {
    "kind": "hold",
    "probability": HELD_SHARE,
    "per_request": True,
    "delay": {"distribution": "constant", "ms": HELD_MS},
}
CHAOS_OPTIONS = (
    *("--group-timeout-ms", "150", "--hang-timeout-ms", "3000"),
    *("--deadline-ms", "6000"),
)
"""Groups have time to fill, and a stopped worker to do harm."""
EVEN_POLICIES = ("uncoded", "coded")
"""Compared under evenly spaced requests, too, which queue the least."""


@dataclass(frozen=True)
class Sizes:
    """How long each part runs, and what it compares."""

    chaos_queries: int
    overhead_queries: int
    light_queries: int
    straggler_requests: int
    straggler_rounds: int
    """In how many turns each arm does its share of them."""
    single_queries: int
    soak_seconds: float
    capacity_seconds: float
    """At each rate that is tried: too short a time flatters, since queues take time to grow."""
    harm_seconds: float
    """From one killed worker to the next; every other time one is stopped, too."""
    routings: tuple[str, ...] = ("round-robin", "least-loaded")
    policies: tuple[str, ...] = ("uncoded", "hedge", "coded", "coded+hedge")


FULL = Sizes(20_000, 1000, 3000, 3000, 4, 2000, 600.0, 15.0, 5.0)
QUICK = Sizes(500, 200, 300, 100, 1, 100, 8.0, 2.0, 1.0, ("round-robin",), ("uncoded", "coded"))


def run(
    name: str,
    *,
    quick: bool,
    data_dir: Path | None,
    seed: int,
    log: Path,
    parts: Sequence[str],
    out: Path | None = None,
) -> dict[str, Any]:
    """Run the parts that were asked for; all if none was named.

    Args:
        name: of the bundle.
        quick: take a minute.
        data_dir: where the image sets lie; None: the shipped test images.
        seed: of arrivals, faults and groups.
        log: where the servers' logs go.
        parts: some of PARTS.
        out: where the report is written, after each part.

    Returns:
        One report: the figures, and what they were measured with.

    Raises:
        UserError: before anything is measured, if `log` cannot be written, or `out` holds parts of
            another bundle or machine.
    """
    sizes = QUICK if quick else FULL
    check_writable(log)
    if out is not None and out.absolute() == log.absolute():
        raise UserError(f"--log: {log} is where the report goes: name another file")
    return asyncio.run(_run(name, sizes, quick, data_dir, seed, log, parts, out))


PARTS = ("chaos", "pool", "overhead", "light", "stragglers", "variants", "soak")
QUICK_PARTS = ("chaos", "pool", "overhead", "stragglers", "soak")
"""What a minute is enough for."""


async def _run(
    name: str,
    sizes: Sizes,
    quick: bool,
    data_dir: Path | None,
    seed: int,
    log: Path,
    parts: Sequence[str],
    out: Path | None,
) -> dict[str, Any]:
    torch.set_num_threads(1)
    bundle = load_bundle(name)
    source = evaluation_images(bundle, "test" if data_dir else "sample", data_dir)
    bench = ServeBench(name, bundle, source, sizes, seed, log)
    wanted = parts or (QUICK_PARTS if quick else PARTS)
    report: dict[str, Any] = {
        "schema_version": SCHEMA,
        "bundle": name,
        "weights": weights_digest(name),
        "images": len(source),
        "seed": seed,
        "quick": quick,
        "machine": describe_machine(),
        "cores": os.cpu_count(),
        "parts": {},
    }
    if out is not None:
        check_mergeable(report, out)
    for part in PARTS:
        if part in wanted:
            began = time.strftime("%Y-%m-%dT%H:%M:%S")
            found = await getattr(bench, part)()
            report |= found
            report["parts"][part] = part_of_report(found, began)
            if out is not None:
                save(report, out)
    return report


class Load(NamedTuple):
    """So many requests of `size` images, `rate` a second."""

    rate: float
    requests: int
    size: int
    poisson: bool = True
    """Else evenly spaced."""


class Arm(NamedTuple):
    """One thing to compare: a policy under a fault and a load."""

    kind: str
    policy: str
    fault: Mapping[str, Any] | None
    load: Load

    @property
    def name(self) -> str:
        """Its name in the report."""
        return f"{self.kind}/{self.policy}"


@dataclass
class Harm:
    """What was done to the workers: whose processes were killed and stopped."""

    killed: list[int] = field(default_factory=list)
    stopped: list[int] = field(default_factory=list)


class EchoSpec(BundleSpec):
    """Workers that answer at once."""

    def load(self) -> Computer:
        """Return what computes nothing."""
        return Echo()


class Echo:
    """The output of every task is one zero."""

    def compute(
        self, number: int, inputs: Mapping[str, np.ndarray]
    ) -> tuple[Mapping[str, np.ndarray], float]:
        """Return it."""
        return {OUTPUT: np.zeros((1, 1), np.float32)}, 0.0


class ServeBench(Loader):
    """The parts, each a coroutine that returns its figures.

    Args:
        name: of the bundle, as `serve` takes it.
        bundle: the same, for the offline answers.
        source: images to send.
        sizes: how long each part runs.
        seed: of arrivals and groups.
        log: where the servers' logs go.
    """

    def __init__(
        self, name: str, bundle: Bundle, source: ImageSource, sizes: Sizes, seed: int, log: Path
    ) -> None:
        images, labels = source.batch(torch.arange(len(source)))
        super().__init__(name, bundle.info.name, images.numpy(), seed, log, sizes.capacity_seconds)
        self.bundle, self.source, self.sizes = bundle, source, sizes
        self.labels = labels.numpy()
        self.capacity = 0.0

    async def pool(self) -> dict[str, Any]:
        """Time the first 10 of 11 answers of workers that answer at once."""
        workers, first, times = 11, 10, []
        pool = ProcessPool(EchoSpec(self.name, 10))
        inputs = {IMAGES: self.images[:1]}
        await pool.start(workers)
        try:
            for turn in range(200):
                began = time.perf_counter()
                calls = [
                    asyncio.ensure_future(pool.call(w, Task(turn * workers + w + 1, 0, inputs)))
                    for w in range(workers)
                ]
                for done, call in enumerate(asyncio.as_completed(calls), start=1):
                    await call
                    if done == first:
                        times.append(1000 * (time.perf_counter() - began))
        finally:
            await pool.stop()
        return {"pool_first_10_of_11_ms": round(statistics.median(times), 3)}

    async def overhead(self) -> dict[str, Any]:
        """Time a query over HTTP with one worker and no code, against the bare forward pass."""
        options = ("--policy", "uncoded", "--workers", "1")
        async with (
            server(self.name, *options, log=self.log) as process,
            connect(process.address, self.model, self.images) as client,
        ):
            await self.warm(client)
            latencies = []
            for i in tqdm(range(self.sizes.overhead_queries), desc="overhead", unit="query"):
                latencies.append((await client.infer(f"o-{i}", self.rows(i, 1))).latency)
            x = torch.from_numpy(self.images[:1])
            bare = median_ms(lambda: self.bundle.classify(self.bundle.embed(x)), repeats=200)
        http = 1000 * statistics.median(latencies)
        return {
            "forward_ms": round(bare, 3),
            "http_p50_ms": round(http, 3),
            "front_end_ms": round(http - bare, 3),
        }

    async def chaos(self) -> dict[str, Any]:
        """Send single images while workers are killed and stopped, and check every answer."""
        k, count, rate = 10, self.sizes.chaos_queries, 100.0
        found: dict[str, Any] = {}
        for routing in self.sizes.routings:
            options = ["--k", str(k), "--routing", routing, *CHAOS_OPTIONS]
            async with (
                server(self.name, *options, log=self.log) as process,
                connect(process.address, self.model, self.images) as client,
            ):
                await self.warm(client)
                harm = Harm()
                harming = asyncio.create_task(self._harm(client, harm, count / rate))
                replies = await self.load(
                    client, rate=rate, count=count, size=1, label=f"chaos, {routing}"
                )
                harming.cancel()
                (ended,) = await asyncio.gather(harming, return_exceptions=True)
                if isinstance(ended, Exception):
                    raise ended  # what came after it met no harm
            figures = {
                "killed": len(harm.killed),
                "stopped": len(harm.stopped),
                "harm_seconds": self.sizes.harm_seconds,
                **self._checked(replies),
            }
            if routing == "round-robin":
                found = {**figures, **self._offline(k)}
            else:
                found["least_loaded"] = figures
        return found

    async def _harm(self, client: Client, harm: Harm, seconds: float) -> None:
        """Kill a worker every `harm_seconds`, and stop another every second time, for a while."""
        generator, period = random.Random(self.seed), self.sizes.harm_seconds
        for turn in range(1, math.ceil(seconds / period)):
            await asyncio.sleep(period)
            workers = (await client.state())["workers"]
            harmed = {None, *harm.killed, *harm.stopped}
            whole = [worker["pid"] for worker in workers if worker["pid"] not in harmed]
            chosen = generator.sample(whole, min(2, len(whole)))
            harm.killed += _signalled(chosen[:1], signal.SIGKILL)
            if turn % 2 == 0:
                harm.stopped += _signalled(chosen[1:], signal.SIGSTOP)

    def _checked(self, replies: Sequence[Reply]) -> dict[str, Any]:
        """Compare every answer with the offline one."""
        answered = [reply for reply in replies if reply.ok]
        rows = np.array([row for reply in answered for row in reply.rows])
        outcomes = np.array([outcome for reply in answered for outcome in reply.outcomes])
        labels = np.concatenate([reply.labels for reply in answered])
        given = np.concatenate([reply.probabilities for reply in answered])
        with torch.inference_mode():
            parts = torch.from_numpy(self.images[rows]).split(500)
            offline = torch.cat([self.bundle.classify(self.bundle.embed(p)) for p in parts]).numpy()
        direct, decoded = outcomes == "direct", outcomes != "direct"
        right = labels == self.labels[rows]
        difference = np.abs(given - offline).max(1)
        n = int(decoded.sum())
        accuracy = float(right[decoded].mean()) if n else None
        return {
            "queries": sum(len(reply.rows) for reply in replies),
            "answered": len(rows),
            "errors": len(replies) - len(answered),
            "mismatched_ids": sum(reply.identity != reply.returned for reply in answered),
            "direct": int(direct.sum()),
            "decoded": n,
            "direct_labels_differ": int((labels != offline.argmax(1))[direct].sum()),
            "direct_probabilities_differ": int((difference > SAME)[direct].sum()),
            "direct_accuracy": round(float(right[direct].mean()), 5),
            "decoded_accuracy": None if accuracy is None else round(accuracy, 5),
            "decoded_accuracy_95": None
            if accuracy is None
            else [round(v, 5) for v in wilson(accuracy, n)],
            **percentiles(replies),
        }

    def _offline(self, k: int) -> dict[str, Any]:
        """Evaluate the same images offline."""
        result = evaluate(scheme_for(self.bundle, k), self.source, k=k, progress=False)
        return {
            "evaluated_normal_accuracy": round(result.normal_accuracy, 5),
            "evaluated_recovered_accuracy": round(result.recovered_accuracy, 5),
        }

    async def light(self) -> dict[str, Any]:
        """Compare p50 of coded and uncoded at 30 % of capacity when nobody straggles."""
        capacity = self.capacity = await self._capacity(1)
        medians: dict[str, list[float]] = {"uncoded": [], "coded": []}
        for _ in range(3):
            for policy, values in medians.items():
                replies = await self._arm(
                    ("--policy", policy),
                    rate=0.3 * capacity,
                    count=self.sizes.light_queries // 3,
                    size=1,
                    label=f"{policy} at 30 %",
                )
                values.append(statistics.median(latencies(replies)))
        ratios = [c / u for c, u in zip(medians["coded"], medians["uncoded"], strict=True)]
        return {
            "capacity_qps": round(capacity, 1),
            "light_p50_ms": {p: [round(v, 3) for v in values] for p, values in medians.items()},
            "light_p50_ratio": round(statistics.median(ratios), 4),
            "light_p50_ratio_spread": [round(min(ratios), 4), round(max(ratios), 4)],
        }

    async def stragglers(self) -> dict[str, Any]:
        """Compare policies when answers are held back for 100 ms, at half of capacity."""
        capacity = await self._capacity(10)
        rate, count = 0.5 * capacity, self.sizes.straggler_requests
        policies = self.sizes.policies
        poisson, even = Load(rate, count, 10), Load(rate, count, 10, poisson=False)
        arms = [Arm("none", "uncoded", None, poisson), Arm("even none", "uncoded", None, even)]
        arms += [Arm("held", policy, HOLD, poisson) for policy in policies]
        arms += [Arm("even held", policy, HOLD, even) for policy in EVEN_POLICIES]
        replies = await self._take_turns(arms)
        return {
            "batch_capacity_rps": round(capacity, 2),
            "batch_rate_rps": round(rate, 2),
            "straggler_rounds": self.sizes.straggler_rounds,
            **tail_ratios(replies, policies, "", self.seed),
            **tail_ratios(replies, EVEN_POLICIES, "even ", self.seed),
            "straggler_arms": self._summaries(replies),
        }

    async def variants(self) -> dict[str, Any]:
        """The same with the workers themselves blocked, and with single images."""
        capacity = await self._capacity(10)
        alone = 0.5 * (self.capacity or await self._capacity(1))
        batches = Load(0.5 * capacity, self.sizes.straggler_requests // 4, 10)
        singles = Load(alone, self.sizes.single_queries, 1)
        block = {**HOLD, "kind": "slow"}
        single = {**HOLD, "probability": HELD_SHARE / 10}
        policies = self.sizes.policies
        arms = [Arm("blocked", policy, block, batches) for policy in policies]
        arms += [Arm("single", policy, single, singles) for policy in policies]
        return {
            "blocked_rate_rps": round(batches.rate, 2),
            "single_rate_qps": round(alone, 2),
            "variant_arms": self._summaries(await self._take_turns(arms)),
        }

    async def _take_turns(self, arms: Sequence[Arm]) -> dict[str, list[Reply]]:
        """Load each arm in short rounds, so that what else the machine does meets all of them."""
        rounds = self.sizes.straggler_rounds
        replies: dict[str, list[Reply]] = {arm.name: [] for arm in arms}
        for turn in range(rounds):
            for arm in arms:
                replies[arm.name] += await self._arm(
                    ("--policy", arm.policy),
                    rate=arm.load.rate,
                    count=arm.load.requests // rounds,
                    size=arm.load.size,
                    label=f"{arm.name}, round {turn + 1} of {rounds}",
                    faults=None if arm.fault is None else {"seed": turn, "faults": [arm.fault]},
                    poisson=arm.load.poisson,
                    seed=self.seed + turn,
                )
        return replies

    def _summaries(self, replies: Mapping[str, Sequence[Reply]]) -> dict[str, Any]:
        return {name: summary(answers, self.labels) for name, answers in replies.items()}

    async def soak(self) -> dict[str, Any]:
        """Load the service for minutes and watch its memory, descriptors and tasks."""
        rate = 60.0
        async with (
            server(self.name, "--k", "10", log=self.log) as process,
            connect(process.address, self.model, self.images) as client,
        ):
            await self.warm(client)
            seconds = self.sizes.soak_seconds
            load = asyncio.create_task(
                self.load(client, rate=rate, count=int(rate * seconds), size=1, label="soak")
            )
            samples = []
            while not load.done():
                await asyncio.wait({load}, timeout=min(15.0, seconds / 8))
                metrics = await client.metrics()
                workers = [worker["pid"] for worker in (await client.state())["workers"]]
                samples.append(
                    {
                        "front_end_mb": memory(process.pid) / 1e6,
                        "workers_mb": sum(map(proportional_memory, filter(None, workers))) / 1e6,
                        "descriptors": descriptors(process.pid),
                        "tasks": metrics["codedinvnet_asyncio_tasks"],
                    }
                )
            errors = sum(not reply.ok for reply in await load)
        settled = samples[max(1, round(len(samples) * min(0.5, 60 / seconds))) :]
        spread = {
            key: round(max(s[key] for s in settled) / settled[0][key] - 1, 4)
            for key in ("front_end_mb", "workers_mb")
        }
        return {
            "soak_seconds": seconds,
            "soak_errors": errors,
            "soak_front_end_growth": spread["front_end_mb"],
            "soak_workers_growth": spread["workers_mb"],
            "soak_descriptors": [settled[0]["descriptors"], settled[-1]["descriptors"]],
            "soak_tasks": [settled[0]["tasks"], settled[-1]["tasks"]],
            "soak_front_end_mb": [round(s["front_end_mb"], 1) for s in samples],
        }


def _signalled(pids: Iterable[int], number: signal.Signals) -> list[int]:
    """Send a signal to processes and return those that were there."""
    found = []
    for pid in pids:
        try:
            os.kill(pid, number)
        except ProcessLookupError:
            continue
        found.append(pid)
    return found
