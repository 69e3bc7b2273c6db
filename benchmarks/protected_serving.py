"""`python -m benchmarks protected NAME --out FOLDER --serve`: a protection on real processes.

The protected model is served three times: with nothing against late answers, with hedging, and by
`auto` with the recommended backup. Each service meets the same arrivals, queries and stragglers.
Workers share this machine's cores, so each task waits a stated time besides computing, a backup's
in proportion to its work.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from codedinvnet.common.grid import Cell, read_rows, resume, seed_of
from codedinvnet.evaluation.service import (
    ParityWait,
    answer_figures,
    injected,
    latency_figures,
    schedule,
    serving,
    work_figures,
)
from codedinvnet.models import OpenModel, open_model
from codedinvnet.protect.folder import description_digest, read_description
from codedinvnet.protect.inputs import read_inputs, split
from codedinvnet.protect.teacher import scores_of

ARMS = {"nothing": "uncoded", "hedging": "hedge", "auto, with the backup": "auto"}
"""What is done about late answers -> the policy."""
STRAGGLERS = ("pareto", "none")
"""1 % of the tasks block their worker for two service times or far longer; or no worker does."""
WORKERS, LOAD = 6, 0.4
WAIT_MS, SERVICE_MS = 80.0, 84.0
QUERIES, DISTINCT = 3000, 500
"""Queries of a run, drawn from so many test inputs."""


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
    protection, wait = folder / f"{name}-protection", None
    words = [str(folder / "model.onnx"), "--policy", policy, "--workers", str(WORKERS)]
    found = read_description(protection)
    (row,) = (row for row in found.table if row.method == found.recommended)
    if policy == "auto":
        words += ["--protection", str(protection)]
        wait = ParityWait(0.0, row.work * WAIT_MS, 1 / row.backup_workers)
    (spec,), scores = model.signature.inputs, found.model.scores
    direct = np.concatenate([scores_of(model, {spec.name: x[None]}) for x in queries])
    seed = seed_of(name, stragglers)
    drawn = np.random.default_rng(seed).integers(len(queries), size=QUERIES)
    run = asyncio.run(
        serving(
            words,
            schedule(WAIT_MS, row.k, wait, injected(stragglers, SERVICE_MS, 1)),
            seed=seed,
            model="model",
            images=queries,
            requests=[[int(i)] for i in drawn],
            rate=LOAD * 1000 * WORKERS / SERVICE_MS,
            label=f"{name} {policy}",
            log=folder / "serving.log",
            tensors=(spec.name, scores),
        )
    )
    same = [
        reply.scores.tobytes() == direct[list(reply.rows)].tobytes()
        for reply in run.replies
        if reply.outcomes == ("direct",)
    ]
    return {
        **latency_figures(run.replies),
        **answer_figures(run.replies, direct.argmax(1)),
        **work_figures(run, WAIT_MS, wait),
        "direct": len(same),
        "direct_equal": sum(same),
        **run.busy,
    }


def table(rows: Path) -> str:
    """Return the runs as Markdown; those of a model's newest protection count."""
    heads = ["served model", "stragglers", "against late answers", "p50, ms", "p99", "p99.9"]
    heads += ["approximate answers, %", "of these agree, %", "direct answers equal bit for bit"]
    lines: list[Sequence[str]] = [[*heads, "work"], ["---"] * (len(heads) + 1)]
    labels = {policy: label for label, policy in ARMS.items()}
    newest = {
        (row["model"], row["stragglers"], row["policy"]): row
        for row in read_rows(rows, "protected-serving")
        if row["error"] is None
    }
    for (model, stragglers, policy), row in sorted(newest.items(), key=_order):
        times = [
            "∞" if row[n] is None else f"{row[n]:.0f}" for n in ("p50_ms", "p99_ms", "p999_ms")
        ]
        agree = row["decoded_accuracy"]
        lines.append(
            [
                *(model, stragglers, labels[policy], *times, f"{100 * row['decoded_share']:.2f}"),
                "" if agree is None else f"{100 * agree:.1f}",
                f"{row['direct_equal']:,} of {row['direct']:,}",
                f"{row['work_per_query']:.3f}",
            ]
        )
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def _order(item: tuple[tuple[str, str, str], Any]) -> tuple[str, int, int]:
    model, stragglers, policy = item[0]
    return model, STRAGGLERS.index(stragglers), [*ARMS.values()].index(policy)
