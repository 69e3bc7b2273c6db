"""`python -m benchmarks protected NAME --out FOLDER --serve`: a protection on real processes.

The protected model is served three times: with nothing against late answers, with hedging, and by
`auto` with the recommended backup. Each service meets the same arrivals, queries and stragglers.
Workers share this machine's cores, so each task waits a stated time besides computing, a backup's
in proportion to its work.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import math
import re
import tempfile
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from pandas import DataFrame

from benchmarks.client import Reply, connect
from benchmarks.processes import server
from codedinvnet.common.distributions import Distribution
from codedinvnet.common.faults import Fault
from codedinvnet.common.grid import Cell, read_rows, resume, seed_of
from codedinvnet.common.quantiles import percentile, rounded
from codedinvnet.evaluation.tables import markdown
from codedinvnet.models import OpenModel, open_model
from codedinvnet.protect.folder import description_digest, read_description
from codedinvnet.protect.inputs import read_inputs, split
from codedinvnet.protect.teacher import answers_of
from codedinvnet.simulation.figures import QUANTILES

ARMS = {"nothing": "uncoded", "hedging": "hedge", "auto, with the backup": "auto"}
"""What is done about late answers -> the policy."""
STRAGGLERS = ("pareto", "none")
"""1 % of the tasks block their worker for two service times or far longer; or no worker does."""
WORKERS, LOAD = 6, 0.4
WAIT_MS, SERVICE_MS = 80.0, 84.0
QUERIES, DISTINCT = 3000, 500
"""Queries of a run, drawn from so many test inputs."""
WARM_REQUESTS = 30
"""Sent one after another before a measurement: every worker has run then, and hedges know a p95."""
SHOWN = {"p50": "p50, ms", "p99": "p99", "p999": "p99.9"}
SETTLE = 0.5
"""Seconds after the last answer, in which the remaining tasks come to their end."""


class Backup(NamedTuple):
    """How long a backup's task keeps its worker without a processor."""

    k: int
    """The number of its first task."""
    image_ms: float
    share: float
    """Of its group's images, those that a task takes."""


def schedule(backup: Backup | None, stragglers: str) -> list[Fault]:
    """Return the waits that make workers on shared processors behave as machines, and faults.

    Which requests a fault hits is drawn by its place in the schedule: it is the same for every
    policy.
    """
    until = None if backup is None else backup.k
    found = [Fault(kind="slow", delay=Distribution(ms=WAIT_MS), spread=True, until_task=until)]
    if stragglers == "pareto":
        delay = Distribution(distribution="pareto", ms=2 * SERVICE_MS)
        found.append(Fault(kind="slow", probability=0.01, delay=delay))
    if backup is not None:
        delay, how = Distribution(ms=backup.image_ms), {"spread": True, "each_image": True}
        found.append(Fault(kind="slow", delay=delay, from_task=backup.k, **how))
    return found


def serve(name: str, folder: Path, inputs: Path, rows: Path) -> None:
    """Measure what is not in the rows yet; a run that failed has its error there."""
    protection = folder / f"{name}-protection"
    model = open_model(folder / "model.onnx")
    found = read_inputs(inputs, model.signature).distinct()
    test = split(len(found), 0).test[:DISTINCT]
    (queries,) = found.batch(test).values()
    settings = {
        "protection": description_digest(protection),
        "backup": read_description(protection).recommended,
        **{"workers": WORKERS, "load": LOAD, "wait_ms": WAIT_MS, "service_ms": SERVICE_MS},
        "queries": QUERIES,
    }
    cells = [
        Cell(
            "protected-serving",
            {"model": name, "policy": policy, "stragglers": stragglers},
            settings,
            partial(_measure, name, folder, model, queries, policy, stragglers),
            f"{name}, {policy}, stragglers: {stragglers}",
        )
        for stragglers in STRAGGLERS
        for policy in ARMS.values()
    ]
    resume(cells, rows)


def _measure(
    name: str, folder: Path, model: OpenModel, queries: np.ndarray, policy: str, stragglers: str
) -> dict[str, Any]:
    """Serve, load, and return the figures of a run."""
    protection, backup = folder / f"{name}-protection", None
    words = [str(folder / "model.onnx"), "--policy", policy, "--workers", str(WORKERS)]
    found = read_description(protection)
    (row,) = (row for row in found.table if row.method == found.recommended)
    if policy == "auto":
        words += ["--protection", str(protection)]
        backup = Backup(row.k, row.work * WAIT_MS, 1 / row.backup_workers)
    (spec,), scores = model.signature.inputs, found.model.output
    direct = np.concatenate([answers_of(model, scores, {spec.name: x[None]}) for x in queries])
    seed = seed_of(name, stragglers)
    rows = [[int(i)] for i in np.random.default_rng(seed).integers(len(queries), size=QUERIES)]
    faults = [fault.model_dump(mode="json") for fault in schedule(backup, stragglers)]

    async def load() -> tuple[list[Reply], Mapping[str, float], Mapping[str, float]]:
        log = folder / "serving.log"
        async with (
            server(*words, "--faults", str(path), log=log) as process,
            connect(process.address, "model", queries, (spec.name, scores)) as client,
        ):
            await client.warm(itertools.islice(itertools.cycle(rows), WARM_REQUESTS), log)
            before, rate = await client.metrics(), LOAD * 1000 * WORKERS / SERVICE_MS
            replies = await client.load(rows, rate=rate, seed=seed, label=f"{name} {policy}")
            await asyncio.sleep(SETTLE)
            return replies, before, await client.metrics()

    with tempfile.TemporaryDirectory() as temporary:
        path = Path(temporary) / "faults.json"
        path.write_text(json.dumps({"seed": seed, "faults": faults}), encoding="utf-8")
        replies, before, after = asyncio.run(load())
    same = [
        reply.scores.tobytes() == direct[list(reply.rows)].tobytes()
        for reply in replies
        if reply.outcomes == ("direct",)
    ]
    return {
        **answer_figures(replies, direct.argmax(1)),
        "work_per_query": round(work(before, after, QUERIES, backup), 4),
        "direct": len(same),
        "direct_equal": sum(same),
    }


def answer_figures(replies: Sequence[Reply], truth: np.ndarray) -> dict[str, Any]:
    """Return the percentiles of single queries in ms, and how they were answered.

    A query without an answer is infinitely late, which JSON has as null. `decoded_accuracy` is the
    share of approximate answers that agree with the model's own classes, (N,).
    """
    latency = [1000 * reply.latency if reply.ok else math.inf for reply in replies]
    decoded = [reply for reply in replies if reply.ok and reply.outcomes != ("direct",)]
    agree = [int(reply.labels[0]) == truth[reply.rows[0]] for reply in decoded]
    return {
        **{f"{name}_ms": rounded(percentile(latency, s), 3) for name, s in QUANTILES.items()},
        "errors": sum(not reply.ok for reply in replies),
        "decoded_share": round(len(decoded) / len(replies), 6),
        "decoded_accuracy": round(sum(agree) / len(agree), 6) if agree else None,
    }


def work(
    before: Mapping[str, float], after: Mapping[str, float], queries: int, backup: Backup | None
) -> float:
    """Return the work of a query by a server's metrics before and after a load.

    Work is how long workers were at tasks, the stated waits included and injected delays not, in
    mean service times of a data task: 1 is what an uncoded service does.
    """

    def grown(name: str, kind: str, label: str = "task") -> float:
        key = f'codedinvnet_{name}{{{label}="{kind}"}}'
        return after.get(key, 0.0) - before.get(key, 0.0)

    data, parity = (1000 * grown("worker_seconds_sum", kind) for kind in ("data", "parity"))
    finished = grown("worker_seconds_count", "data")
    spent = data + parity + WAIT_MS * finished
    if backup is not None:
        sizes = (re.fullmatch(r'codedinvnet_groups_total\{size="(\d+)"\}', key) for key in after)
        groups = {int(m[1]): grown("groups_total", m[1], "size") for m in sizes if m}
        images = sum(size * count for size, count in groups.items()) * backup.share
        # A group counts by its first backup's task; the others take as many images.
        spent += (
            backup.image_ms * images * grown("tasks_total", "parity") / (sum(groups.values()) or 1)
        )
    return spent / (queries * (WAIT_MS + data / finished))


def table(rows: Path) -> str:
    """Return the runs as Markdown; those of a model's newest protection count."""
    labels = {policy: label for label, policy in ARMS.items()}
    newest = {
        (row["model"], STRAGGLERS.index(row["stragglers"]), [*labels].index(row["policy"])): row
        for row in read_rows(rows, "protected-serving")
        if row["error"] is None
    }
    lines = []
    for _, row in sorted(newest.items()):
        times = ["∞" if (ms := row[f"{name}_ms"]) is None else f"{ms:.0f}" for name in SHOWN]
        agree = row["decoded_accuracy"]
        lines.append(
            {
                "served model": row["model"],
                "stragglers": row["stragglers"],
                "against late answers": labels[row["policy"]],
                **dict(zip(SHOWN.values(), times, strict=True)),
                "approximate answers, %": f"{100 * row['decoded_share']:.2f}",
                "of these agree, %": "" if agree is None else f"{100 * agree:.1f}",
                "direct answers equal bit for bit": f"{row['direct_equal']:,} of {row['direct']:,}",
                "work": f"{row['work_per_query']:.3f}",
            }
        )
    return markdown(DataFrame(lines)).strip()
