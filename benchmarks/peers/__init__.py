"""`python -m benchmarks peers`: tail latency of proxies in front of the same faulty servers.

Eight servers work on one request at a time, for ten milliseconds. Every contender gets the same
arrivals, service times and faults, one after the other, in random order. What has a setting to be
tuned gets the best of a sweep, chosen on a seed that is not reported; ours runs on its defaults.
Finished cells in the file of rows are kept, so that a run that was cut off can go on.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd

from benchmarks.peers import predicted
from benchmarks.peers.contenders import CONTENDERS, TUNED, TUNINGS
from benchmarks.peers.libraries import LIBRARIES
from benchmarks.peers.pages import SITUATION, SWEEP_SEED, read, summary, table
from benchmarks.peers.trials import Trial, measure, shuffled
from benchmarks.peers.upstreams import MODEL_SECONDS, STOPPED
from codedinvnet.common.errors import UserError
from codedinvnet.common.grid import Cell, refuse_failures, resume

ROWS = Path("docs/results/peers.jsonl")
SEEDS, QUICK_SEEDS = (1, 2, 3), (1,)
LOADS = (0.4, 0.7)
QUICK_FAULTS = ("none", "pareto", "slow", "held", "silent")
FAULTS = (*QUICK_FAULTS, "exponential", "sizes", "all-slow", "killed", "refused", "garbage")
REAL_FAULTS = ("none", STOPPED)
"""Those of servers that compute models."""
QUICK_PEERS = (
    "envoy-least-request",
    "envoy-hedge",
    "haproxy-leastconn",
    "nginx",
    "ours-hedge",
)
REQUESTS, QUICK_REQUESTS = 8000, 3000


def run(
    *,
    quick: bool,
    peer: Sequence[str] | None,
    fault: Sequence[str] | None,
    load: Sequence[float] | None,
    slots: Sequence[int],
    servers: Sequence[int],
    seeds: int | None,
    requests: int | None,
    bursty: bool,
    kind: str,
    predict: bool,
    out: Path,
) -> dict[str, Any]:
    """Measure what is missing, and return the table; see `benchmarks.command_line`."""
    if predict:
        return {"rows": [], "table": predicted.table(out)}
    timed, real = kind == "timed", kind in MODEL_SECONDS
    peers = peer or (QUICK_PEERS if quick or not timed else (*CONTENDERS, *LIBRARIES))
    if wrong := [name for name in peers if name in LIBRARIES and not timed]:
        raise UserError(f"--kind {kind}: not for {', '.join(wrong)}")
    faults = fault or (REAL_FAULTS if real else QUICK_FAULTS if quick else FAULTS)
    if wrong := [name for name in faults if real and name not in REAL_FAULTS]:
        raise UserError(f"--kind {kind}: only {' and '.join(REAL_FAULTS)}, not {', '.join(wrong)}")
    loads = load or (LOADS[:1] if quick else LOADS)
    numbers = range(1, seeds + 1) if seeds else QUICK_SEEDS if quick else SEEDS
    requests = requests or (QUICK_REQUESTS if quick else REQUESTS)
    trials = [
        Trial(name, trouble, share, count, slot, seed, requests, bursty, kind=kind)
        for seed, slot, count, share, trouble, name in itertools.product(
            numbers, slots, servers, loads, faults, peers
        )
    ]
    sweeps = {
        replace(trial, seed=SWEEP_SEED, requests=requests // 2, tuning=tuning)
        for trial in trials
        if trial.peer in TUNED
        for tuning in TUNINGS
    }
    failed = _measure(sorted(sweeps, key=repr), out)
    rows = read(out)
    failed += _measure([replace(one, tuning=best_tuning(rows, one)) for one in trials], out)
    refuse_failures(failed, "of the trials", out)
    rows = read(out)
    return {"rows": [], "table": f"{table(rows)}\n\n{summary(rows)}".strip()}


def best_tuning(rows: pd.DataFrame, trial: Trial) -> float:
    """Return the setting with the lowest p99.9 in the sweep of a trial's situation, or 0."""
    if trial.peer not in TUNED:
        return 0.0
    same = rows[rows.seed == SWEEP_SEED]
    for column in ("peer", *SITUATION):
        same = same[same[column] == getattr(trial, column)]
    return float(same.loc[same["p99.9"].idxmin(), "tuning"])


def _measure(trials: Sequence[Trial], out: Path) -> int:
    """Measure the trials that a file lacks, in random order; return how many failed."""
    cells = [
        Cell("peers", asdict(trial), {}, partial(measure, trial), trial.name, trial.seconds)
        for trial in shuffled(trials, seed=0)
    ]
    return resume(cells, out)["failed"]
