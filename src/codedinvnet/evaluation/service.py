"""A run of the real service: its workers wait as machines of their own would, and it is loaded."""

from __future__ import annotations

import asyncio
import itertools
import json
import math
import re
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from pydantic import ValidationError

from codedinvnet.common.config import describe
from codedinvnet.common.errors import UserError
from codedinvnet.common.faults import Delay, Fault
from codedinvnet.common.processes import ProcessorTime, processor_time, server
from codedinvnet.common.quantiles import Histogram, percentile, rounded
from codedinvnet.evaluation.client import TENSORS, Reply, connect
from codedinvnet.simulation.figures import QUANTILES
from codedinvnet.simulation.stragglers import Straggler, stragglers

WARM_REQUESTS = 30
"""Sent one after another before a measurement: every worker has run then, and hedges know a p95."""
SETTLE = 0.5
"""Seconds after the last answer, in which the remaining tasks come to their end."""


class ParityWait(NamedTuple):
    """How long a parity keeps its worker without a processor, in ms."""

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


def injected(model: str, service_ms: float, batch: int) -> list[Fault]:
    """Return the faults that make the service's workers straggle as the simulator's do.

    A worker that is slower for good is blocked for the difference to the mean service time, because
    the service cannot slow its computing.
    """
    return [_fault(model, cause, service_ms) for cause in stragglers(model, service_ms, batch)]


def _fault(model: str, straggler: Straggler, service_ms: float) -> Fault:
    raw = straggler.model_dump(exclude_none=True, exclude={"delay", "factor"})
    if straggler.kind == "factor":
        assert straggler.factor is not None
        raw |= {"kind": "slow", "delay": {"ms": (straggler.factor - 1) * service_ms}}
    elif straggler.delay is not None:
        delay = straggler.delay.model_dump(exclude_defaults=True)
        raw["delay"] = {"ms": straggler.delay.ms, **delay}
    try:
        return Fault.model_validate(raw)
    except ValidationError as error:
        raise UserError(
            f"{model!r}: the service cannot inject {straggler.kind!r} like this "
            f"({describe(error, Fault)}): use `codedinvnet simulate`"
        ) from error


class Run(NamedTuple):
    """What came of a load."""

    replies: list[Reply]
    before: dict[str, float]
    """The metrics before it, by name with labels."""
    after: dict[str, float]
    busy: dict[str, Any]
    """The shares of the processors' time that were used."""


async def serving(
    words: Sequence[str],
    faults: Sequence[Fault],
    *,
    seed: int,
    model: str,
    images: np.ndarray,
    requests: Sequence[Sequence[int]],
    rate: float,
    label: str,
    log: Path,
    tensors: tuple[str, str] = TENSORS,
) -> Run:
    """Run `codedinvnet serve` with faults, warm it, load it, and return what came of it.

    Args:
        words: its command line.
        faults: its schedule of faults.
        seed: of the faults and the arrivals.
        model: the model's name.
        images: those that requests choose from, (N, C, H, W).
        requests: of each the rows of its queries.
        rate: requests a second.
        label: of the progress bar.
        log: the service's.
        tensors: the names of the model's input and of its scores.
    """
    dumped = {"seed": seed, "faults": [fault.model_dump(mode="json") for fault in faults]}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "faults.json"
        path.write_text(json.dumps(dumped), encoding="utf-8")
        async with (
            server(*words, "--faults", str(path), log=log) as process,
            connect(process.address, model, images, tensors) as client,
        ):
            await client.warm(itertools.islice(itertools.cycle(requests), WARM_REQUESTS), log)
            before, processors = await client.metrics(), processor_time(process.pid)
            replies = await client.load(requests, rate=rate, seed=seed, label=label)
            queries = sum(map(len, requests))
            busy = busy_shares(processors, processor_time(process.pid), queries)
            await asyncio.sleep(SETTLE)
            return Run(replies, before, await client.metrics(), busy)


def latency_figures(replies: Sequence[Reply]) -> dict[str, Any]:
    """Return the percentiles of a run's requests in ms, and their histogram.

    A request that was not answered counts as infinitely late, which JSON has as null.
    """
    latency = np.array([1000 * reply.latency if reply.ok else math.inf for reply in replies])
    return {
        **{f"{name}_ms": rounded(percentile(latency, s), 3) for name, s in QUANTILES.items()},
        "histogram": Histogram.of(latency).as_json(),
    }


def answer_figures(replies: Sequence[Reply], truth: np.ndarray) -> dict[str, Any]:
    """Return how queries were answered; one without an answer counts as wrong."""
    answered = [reply for reply in replies if reply.ok]
    queries = sum(len(reply.rows) for reply in replies)
    rows = np.array([row for reply in answered for row in reply.rows], np.int64)
    outcomes = np.array([outcome for reply in answered for outcome in reply.outcomes], str)
    labels = np.array([label for reply in answered for label in reply.labels], np.int64)
    right, decoded = labels == truth[rows], outcomes != "direct"
    count = int(decoded.sum())
    return {
        "queries": queries,
        "errors": len(replies) - len(answered),
        "missing_share": round(1 - len(rows) / queries, 6),
        "decoded_share": round(count / queries, 6),
        "accuracy": round(float(right.sum()) / queries, 6),
        "decoded_accuracy": round(float(right[decoded].mean()), 6) if count else None,
    }


def work_figures(run: Run, wait_ms: float, parity_wait: ParityWait | None = None) -> dict[str, Any]:
    """Return what a run cost, from the server's metrics before and after it.

    Work is how long workers were at tasks, the stated waits included and injected delays not, in
    mean service times of a data task: 1 a query is what an uncoded service does.
    """
    before, after = run.before, run.after
    queries = sum(len(reply.rows) for reply in run.replies)

    def grown(name: str, kind: str = "", label: str = "task") -> float:
        key = f"codedinvnet_{name}" + (f'{{{label}="{kind}"}}' if kind else "")
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
    return {
        "mean_service_ms": round(mean, 3),
        "work_per_query": round(work / (queries * mean), 4),
        "data_tasks_per_query": round(grown("tasks_total", "data") / queries, 4),
        "extra_tasks_per_query": round(grown("tasks_total", "parity") / queries, 4),
        "encode_ms_per_query": round(1000 * grown("encode_seconds_sum") / queries, 4),
    }


def busy_shares(
    before: ProcessorTime | None, after: ProcessorTime | None, queries: int
) -> dict[str, Any]:
    """Return the shares of the processors' time that all and the run's own processes used.

    `front_ms_per_query` is the time that the front end took for a query.
    """
    if before is None or after is None:
        return dict.fromkeys(("processors_busy", "processors_own", "front_ms_per_query"))
    own, front, busy, whole = (b - a for a, b in zip(before, after, strict=True))
    return {
        "front_ms_per_query": round(1000 * front / queries, 4),
        "processors_busy": round(busy / max(whole, 1e-9), 4),
        "processors_own": round(own / max(whole, 1e-9), 4),
    }
