"""`python -m benchmarks peers`: tail latency of proxies in front of the same faulty servers.

Eight servers work on one request at a time, for ten milliseconds. Every contender gets the same
arrivals, service times and faults, one after the other, in random order. What has a setting to be
tuned gets the best of a sweep, chosen on a seed that is not reported; ours runs on its defaults.
Finished cells in the file of rows are kept, so that a run that was cut off can go on.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd

from benchmarks.peers.contenders import CONTENDERS
from benchmarks.peers.pages import FIRST, SITUATION, SWEEP_SEED, read, several_of, summary, table
from benchmarks.peers.pages import SEVERAL as SEVERAL_PEERS
from benchmarks.peers.trials import Trial, measure, shuffled
from benchmarks.peers.upstreams import STOPPED
from codedinvnet.common.grid import Cell, expand, refuse_failures, resume, select

ROWS = Path("docs/results/peers.jsonl")
Axes = Mapping[str, Sequence[Any]]
FAULTS = (
    *(*FIRST, "exponential", "lognormal", "sizes", "all-slow", "antagonists"),
    *("killed", "refused", "garbage"),
)
TYPICAL = ("none", "pareto", "sizes")
SEVERAL: tuple[Axes, ...] = (
    {"fault": FIRST, "load": (0.4,), "instances": (1, 2, 4)},
    {"fault": ("none", "pareto", "slow"), "load": (0.7,), "instances": (1, 2, 4)},
    {"fault": ("none", "held"), "load": (0.9,), "instances": (1, 2, 4)},
)
"""Where servers keep up, and each fault happens within a short run."""
PLAN: tuple[Axes, ...] = (
    {"fault": FAULTS, "load": (0.4, 0.7)},
    {"fault": ("none", "slow", "garbage"), "load": (0.4,), "kind": ("unnamed",)},
    {"fault": TYPICAL, "load": (0.4, 0.7), "bursty": (True,)},
    {"fault": TYPICAL, "load": (0.2, 0.9, 1.2)},
    {"fault": TYPICAL, "load": (0.7,), "servers": (3, 32)},
    {"fault": TYPICAL, "load": (0.7,), "slots": (4,)},
    {"fault": ("none", "pareto", "slow", "held"), "load": (0.4,), "kind": ("streams",)},
    {"fault": ("none", STOPPED), "load": (0.4,), "kind": ("onnx",)},
)
"""The situations: every combination of each group's axes."""
QUICK: tuple[Axes, ...] = (
    {"fault": (*FIRST, "antagonists"), "load": (0.4,)},
    {"fault": ("pareto",), "load": (0.4,), "instances": (4,)},
    {"fault": ("garbage",), "load": (0.4,), "kind": ("unnamed",)},
)
QUICK_PEERS = ("envoy-hedge", "haproxy-leastconn", "nginx", "ours-hedge")
SEEDS, QUICK_SEEDS = 3, 1
REQUESTS, QUICK_REQUESTS = 8000, 2000


def planned(plan: Sequence[Axes], seeds: int, **given: Any) -> Iterator[Trial]:
    """Yield the trials of a plan: each seed's situations with all contenders that suit them."""
    for seed in range(1, seeds + 1):
        for group in plan:
            for axes in expand(**group, peer=CONTENDERS):
                slots = 3 if axes.get("kind") == "streams" else 1
                trial = Trial(**{"slots": slots, **axes, "seed": seed, **given})
                if trial.is_sensible:
                    yield trial


def run(
    *,
    quick: bool,
    several: bool,
    only: Sequence[str],
    seeds: int | None,
    requests: int | None,
    out: Path,
) -> dict[str, Any]:
    """Measure what is missing, and return the table; see `benchmarks.command_line`."""
    found = planned(
        SEVERAL if several else QUICK if quick else PLAN,
        seeds or (QUICK_SEEDS if quick else SEEDS),
        requests=requests or (QUICK_REQUESTS if quick else REQUESTS),
    )
    peers = SEVERAL_PEERS if several else QUICK_PEERS if quick else CONTENDERS
    trials = select([trial for trial in found if trial.peer in peers], only, asdict)
    sweeps = {
        replace(trial, seed=SWEEP_SEED, requests=trial.requests // 2, tuning=tuning)
        for trial in trials
        for tuning in CONTENDERS[trial.peer].tunings
    }
    failed = _measure(sorted(sweeps, key=repr), out)
    rows = read(out)
    failed += _measure([replace(one, tuning=best_tuning(rows, one)) for one in trials], out)
    refuse_failures(failed, "of the trials", out)
    rows = read(out)
    if several:
        return {"rows": [], "table": several_of(rows)}
    return {"rows": [], "table": f"{table(rows)}\n\n{summary(rows)}".strip()}


def best_tuning(rows: pd.DataFrame, trial: Trial) -> float:
    """Return the setting with the lowest p99.9 in the sweep of a trial's situation, or 0."""
    if not CONTENDERS[trial.peer].tunings:
        return 0.0
    same = rows[rows.seed == SWEEP_SEED]
    for column in ("peer", *SITUATION):
        same = same[same[column] == getattr(trial, column)]
    return float(same.loc[same["p99.9"].idxmin(), "tuning"])


def _measure(trials: Sequence[Trial], out: Path) -> int:
    """Measure the trials that a file lacks, in random order; return how many failed."""
    cells = []
    for one in shuffled(trials, seed=0):
        how = CONTENDERS[one.peer].settings
        cells.append(Cell("peers", asdict(one), how, partial(measure, one), one.name, one.seconds))
    return resume(cells, out)["failed"]
