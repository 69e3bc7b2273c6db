"""`python -m benchmarks straggling`: a protected model against hedging, under straggler models.

Every arm gets the same arrivals on real processes: `uncoded` does nothing about stragglers, `hedge`
copies a k-th of the queries at most, and `auto` has the backup answer late ones. Workers share this
machine's processors, so each computes for a moment and waits for the rest of its service time, as a
machine of its own would (docs/explanation/protocol.md).
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from pandas import DataFrame

from codedinvnet.codes.base import Scheme
from codedinvnet.codes.rules import is_systematic
from codedinvnet.errors import UserError
from codedinvnet.evaluation import latency_tables, tables
from codedinvnet.evaluation.client import Reply
from codedinvnet.evaluation.grid import Cell, Row, latest, read_rows, resume, seed_of
from codedinvnet.evaluation.service import (
    ParityWait,
    injected,
    latency_figures,
    schedule,
    serving,
    work_figures,
)
from codedinvnet.files import check_writable
from codedinvnet.models import OpenModel, open_model
from codedinvnet.processes import usable_processors
from codedinvnet.protect.folder import description_digest, load_protection, read_description
from codedinvnet.protect.inputs import Inputs, read_inputs, split
from codedinvnet.protect.teacher import scores_of
from codedinvnet.serving.opened import called
from codedinvnet.serving.workers.faults import Fault

KIND = "straggling"
STRAGGLERS = ("pareto", "held", "slower")
ARMS = ("uncoded", "hedge", "auto")
SERVICE_MS = 42.0
"""Mean service time, unless the model computes for long."""
BUSY = 0.5
"""Share of this machine's processors that computing may take."""
PERCENTILES = ("p50", "p99", "p999")
SHARES = {
    "agreement %": "agreement",
    "approximate %": "approximate_share",
    "of them agree %": "approximate_agreement",
}
"""Column of the table -> the share of a row."""
PLACE = ("stragglers", "policy", "digest")
INPUTS = 500
"""Inputs that requests choose from."""


@dataclass(frozen=True)
class Place:
    """What all arms have in common.

    Attributes:
        model: the served model.
        protection: its protection's folder.
        scheme: of the method.
        inputs: queries, (N, *shape) by name.
        wanted: the model's own answers, (N,).
        workers: of the service.
        load: share of their time that direct answers take.
        batch: queries of a request.
        requests: of a run.
        seed: of the arrivals.
        log: of the servers.
    """

    model: OpenModel
    protection: Path
    scheme: Scheme
    inputs: Mapping[str, np.ndarray]
    wanted: np.ndarray
    workers: int
    load: float
    batch: int
    requests: int
    seed: int
    log: Path


def run(
    protection: Path,
    model: Path,
    inputs: Path,
    *,
    method: str | None,
    workers: int,
    load: float,
    batch: int,
    requests: int,
    stragglers: Sequence[str],
    seed: int,
    out: Path,
    log: Path,
) -> dict[str, Any]:
    """Do all runs, and return a report of them; rows of the same settings that `out` has are kept.

    A run that fails is a row with its error. The others go on, and the same command tries it again.

    Args:
        protection: the folder that `codedinvnet protect` wrote.
        model: of which it is the protection.
        inputs: those that the protection was made of; its test inputs are asked for.
        method: one of the protection's; None: the recommended one.
        workers: of the service.
        load: share of the workers' time that direct answers take.
        batch: queries of a request.
        requests: of a run.
        stragglers: names of straggler models.
        seed: of the arrivals.
        out: the rows, JSON Lines.
        log: the servers'.

    Raises:
        UserError: if the model or its protection cannot be served, or the inputs are others, or
            there is no such straggler model, or `out` holds rows of something else.
    """
    read_rows(out, KIND)
    opened = open_model(model)
    scheme = load_protection(protection, opened, method)
    if not is_systematic(scheme.rules):
        raise UserError(f"{scheme.name} has no direct answers to copy: name another --method")
    needed = len(scheme.rules.tasks(scheme.rules.k))
    if workers < needed:
        raise UserError(f"--workers {workers}: {scheme.name} needs {needed}")
    described = read_description(protection)
    found = read_inputs(inputs, opened.signature).distinct()
    drawn = np.random.default_rng(seed).permutation(unseen(found, described))[:INPUTS]
    queries = found.batch(np.sort(drawn))
    parts = [{name: array[i : i + 1] for name, array in queries.items()} for i in range(len(drawn))]
    wanted = np.concatenate([scores_of(opened, part).argmax(1) for part in parts])
    sizes = (workers, load, batch, requests, seed)
    place = Place(opened, protection, scheme, queries, wanted, *sizes, log)
    compute = described["model"]["ms"][0]
    service = _service_ms(compute, workers, load)
    settings = {
        "model": opened.source.digest,
        "protection": description_digest(protection),
        "method": scheme.name,
        "workers": workers,
        "load": load,
        "batch": batch,
        "requests": requests,
        "seed": seed,
        "service_ms": service,
    }
    faults = {name: injected(name, service, batch) for name in stragglers}
    check_writable(out)
    cells = [
        Cell(
            KIND,
            {"stragglers": straggler, "policy": arm, "digest": settings["protection"]},
            settings,
            partial(_measured, place, straggler, faults[straggler], arm, service, compute),
            f"{straggler} {arm}",
        )
        for straggler, arm in itertools.product(faults, ARMS)
    ]
    resume(cells, out)
    keys = {cell.key for cell in cells}
    rows = [row for row in read_rows(out, KIND) if row["key"] in keys]
    return {"rows": rows, "table": table(rows)}


def unseen(inputs: Inputs, described: Mapping[str, Any]) -> np.ndarray:
    """Return the rows that nothing of a protection was trained on or chosen by.

    Raises:
        UserError: if the inputs are not the protection's own, so that nobody knows which those are.
    """
    settings = described["settings"]
    if inputs.digest() != settings["inputs"]:
        raise UserError("--inputs: the protection was made of other inputs: give the same file")
    return split(len(inputs), settings["seed"]).test


def _service_ms(compute: float, workers: int, load: float) -> float:
    """Return a service time at which the processors are busy for no more than BUSY."""
    busy = BUSY * usable_processors()
    return max(SERVICE_MS, round(workers * load * compute / busy, 1))


def _measured(
    place: Place,
    straggler: str,
    faults: Sequence[Fault],
    arm: str,
    service: float,
    compute: float,
) -> dict[str, Any]:
    """Return the figures of one run."""
    k, scores = place.scheme.rules.k, place.model.signature.scores
    assert scores is not None
    extra = place.scheme.rules.tasks(k)[k]
    wait = max(0.0, service - compute)
    coded = arm == "auto"
    # What the extra task waits goes by its cost, for each of its queries.
    members = len(extra.members)
    parity = ParityWait(0.0, wait * extra.cost / members, members / k) if coded else None
    words = [place.model.source.source, "--policy", arm, "--workers", str(place.workers)]
    words += ["--set", "group-timeout-ms=50"]
    if coded:
        words += ["--protection", str(place.protection), "--method", place.scheme.name]
    else:
        words += ["--k", str(k)] if arm == "hedge" else []  # as many copies as the backup answers
    # The same for all arms under one straggler model.
    seed = seed_of(place.seed, straggler)
    drawn = np.random.default_rng(seed).integers(
        len(place.wanted), size=(place.requests, place.batch)
    )
    run = asyncio.run(
        serving(
            words,
            schedule(wait, k, parity, faults),
            seed=seed,
            model=called(place.model.source.source),
            inputs=place.inputs,
            scores=scores.output,
            requests=drawn.tolist(),
            rate=place.load * place.workers / (service / 1000) / place.batch,
            label=f"{straggler} {arm}",
            log=place.log,
        )
    )
    return {
        **latency_figures(run.replies),
        **answers(run.replies, place.wanted),
        **work_figures(run, wait, parity),
    }


def answers(replies: Sequence[Reply], wanted: np.ndarray) -> dict[str, Any]:
    """Return how often answers are the model's own: of all queries, and of approximate answers."""
    answered = [reply for reply in replies if reply.ok]
    agrees = [
        bool(label == wanted[row])
        for reply in answered
        for row, label in zip(reply.rows, reply.labels, strict=True)
    ]
    outcomes = [outcome for reply in answered for outcome in reply.outcomes]
    late = [a for a, outcome in zip(agrees, outcomes, strict=True) if outcome != "direct"]
    return {
        "errors": len(replies) - len(answered),
        "agreement": sum(agrees) / len(agrees) if agrees else None,
        "approximate_share": len(late) / len(agrees) if agrees else None,
        "approximate_agreement": sum(late) / len(late) if late else None,
    }


def table(rows: Iterable[Row]) -> str:
    """Return the rows for a reader, as Markdown, without those of runs that failed."""
    lines = []
    for row in latest(rows, PLACE).to_dict("records"):
        line = {"stragglers": row["stragglers"], "policy": row["policy"]}
        line |= {f"{latency_tables.TITLES[name]} ms": row[f"{name}_ms"] for name in PERCENTILES}
        line["work"] = row["work_per_query"]
        for title, name in SHARES.items():
            line[title] = None if row[name] is None else 100 * row[name]
        lines.append(line)
    formats = {f"{latency_tables.TITLES[name]} ms": ".0f" for name in PERCENTILES}
    return tables.markdown(
        DataFrame(lines), {**formats, "work": ".3f", **dict.fromkeys(SHARES, ".2f")}
    )
