"""A run of the real service: its workers wait as machines of their own would, and it is loaded."""

from __future__ import annotations

import asyncio
import itertools
import json
import math
import re
import tempfile
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from codedinvnet.evaluation.client import Client, Reply, connect
from codedinvnet.evaluation.quantiles import Histogram, percentile, rounded
from codedinvnet.processes import ProcessorTime, processor_time, server
from codedinvnet.serving.workers.faults import Delay, Fault
from codedinvnet.simulation.figures import QUANTILES

WARM_REQUESTS = 30
"""Sent one after another before a measurement: every worker has run then, and hedges know a p95."""
SETTLE = 0.5
"""Seconds after the last answer, in which tasks that nobody waits for come to their end."""


class ParityWait(NamedTuple):
    """What a parity keeps its worker for without a processor, in ms."""

    task: float
    image: float
    """Besides, for each image that it takes."""
    share: float = 1.0
    """Of its group's images, those that it takes."""


def schedule(
    wait_ms: float, k: int, parity: ParityWait | None, faults: Sequence[Fault]
) -> list[Fault]:
    """Return the waits that make workers on shared processors behave as machines, and faults.

    Which requests a fault hits is drawn by its place in the schedule: it is the same for every
    method.

    Args:
        wait_ms: what a data task waits.
        k: members of a group.
        parity: what a parity waits; None without parities.
        faults: what else goes wrong.
    """
    until = None if parity is None else k
    data = Fault(kind="slow", delay=Delay(ms=wait_ms), spread=True, until_task=until)
    if parity is None:
        return [data, *faults]
    task, image = Delay(ms=parity.task), Delay(ms=parity.image)
    others = [
        Fault(kind="slow", delay=task, spread=True, from_task=k),
        Fault(kind="slow", delay=image, spread=True, from_task=k, each_image=True),
    ]
    return [data, *faults, *(wait for wait in others if wait.delay is not None and wait.delay.ms)]


class Run(NamedTuple):
    """What came of a load."""

    replies: list[Reply]
    before: dict[str, float]
    """The metrics before it, by name with labels."""
    after: dict[str, float]
    times: dict[str, Any]
    """What the tasks took, as distributions of a scenario."""
    busy: dict[str, Any]
    """The shares of the processors' time that were used."""


@dataclass(frozen=True)
class Service:
    """A service of its own, warm.

    Attributes:
        client: sends it requests.
        pid: its process.
    """

    client: Client
    pid: int

    async def load(
        self, requests: Sequence[Sequence[int]], *, rate: float, seed: int, label: str
    ) -> Run:
        """Send requests, see `Client.load`, and return what came of them."""
        before, processors = await self.client.metrics(), processor_time(self.pid)
        replies = await self.client.load(requests, rate=rate, seed=seed, label=label)
        queries = sum(map(len, requests))
        busy = busy_shares(processors, processor_time(self.pid), queries)
        await asyncio.sleep(SETTLE)
        after, times = await self.client.metrics(), await self.client.get("times")
        return Run(replies, before, after, times, busy)


@asynccontextmanager
async def serving(
    words: Sequence[str],
    faults: Sequence[Fault],
    *,
    seed: int,
    model: str,
    inputs: Mapping[str, np.ndarray],
    scores: str = "probabilities",
    first: Sequence[Sequence[int]],
    log: Path,
) -> AsyncIterator[Service]:
    """Run `codedinvnet serve` with faults until it is warm, and end it behind the body.

    Args:
        words: its command line.
        faults: its schedule of faults.
        seed: of the faults.
        model: the model's name.
        inputs: see `Client`.
        scores: see `Client`.
        first: requests to begin with.
        log: the service's.

    Raises:
        UserError: if it does not start, or does not answer.
    """
    dumped = {"seed": seed, "faults": [fault.model_dump(mode="json") for fault in faults]}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "faults.json"
        path.write_text(json.dumps(dumped), encoding="utf-8")
        async with (
            server(*words, "--faults", str(path), log=log) as process,
            connect(process.address, model, inputs, scores) as client,
        ):
            await client.warm(itertools.islice(itertools.cycle(first), WARM_REQUESTS), log)
            yield Service(client, process.pid)


def latency_figures(replies: Sequence[Reply]) -> dict[str, Any]:
    """Return the percentiles of a run's requests in ms, and their histogram.

    A request that was not answered counts as infinitely late; None stands for that.

    Args:
        replies: of all requests.
    """
    latency = np.array([1000 * reply.latency if reply.ok else math.inf for reply in replies])
    return {
        **{f"{name}_ms": rounded(percentile(latency, s), 3) for name, s in QUANTILES.items()},
        "histogram": Histogram.of(latency).as_json(),
    }


def work_figures(run: Run, wait_ms: float, parity_wait: ParityWait | None = None) -> dict[str, Any]:
    """Return what a run cost, from the server's metrics before and after it.

    Work is how long workers were at tasks, the stated waits included and injected delays not, in
    mean service times of a data task: 1 a query is what an uncoded service does.

    Args:
        run: what came of the load.
        wait_ms: of a data task.
        parity_wait: of a parity.
    """
    before, after = run.before, run.after
    queries = sum(len(reply.rows) for reply in run.replies)

    def grown(name: str, kind: str, label: str = "task") -> float:
        key = f'codedinvnet_{name}{{{label}="{kind}"}}'
        return after.get(key, 0.0) - before.get(key, 0.0)

    seconds = {kind: grown("worker_seconds_sum", kind) for kind in ("data", "parity")}
    finished = {kind: grown("worker_seconds_count", kind) for kind in ("data", "parity")}
    mean = wait_ms + 1000 * seconds["data"] / finished["data"]
    work = 1000 * sum(seconds.values()) + wait_ms * finished["data"]
    if parity_wait is not None:
        found = (re.fullmatch(r'codedinvnet_groups_total\{size="(\d+)"\}', key) for key in after)
        groups = {int(m[1]): grown("groups_total", m[1], "size") for m in found if m}
        images = sum(size * count for size, count in groups.items()) * parity_wait.share
        # A group counts by its first parity; the others take as many images.
        each = grown("tasks_total", "parity") / (sum(groups.values()) or 1)
        work += parity_wait.task * finished["parity"] + parity_wait.image * images * each
    encode = "codedinvnet_encode_seconds_sum"
    return {
        "mean_service_ms": round(mean, 3),
        "work_per_query": round(work / (queries * mean), 4),
        "data_tasks_per_query": round(grown("tasks_total", "data") / queries, 4),
        "extra_tasks_per_query": round(grown("tasks_total", "parity") / queries, 4),
        "encode_ms_per_query": round(
            1000 * (after.get(encode, 0.0) - before.get(encode, 0.0)) / queries, 4
        ),
    }


def busy_shares(
    before: ProcessorTime | None, after: ProcessorTime | None, queries: int
) -> dict[str, Any]:
    """Return the share of the processors' time that was used, and by service and client.

    And how many ms of a processor the front end took for each query of the run.
    """
    if before is None or after is None:
        names = ("processors_busy", "processors_own", "front_ms_per_query")
        return dict.fromkeys(names)
    own, front, busy, whole = (b - a for a, b in zip(before, after, strict=True))
    return {
        "front_ms_per_query": round(1000 * front / queries, 4),
        "processors_busy": round(busy / max(whole, 1e-9), 4),
        "processors_own": round(own / max(whole, 1e-9), 4),
    }
