"""What the simulator says of our gateway's cells, from the parameters of load and fault alone."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import pandas as pd

from benchmarks.peers import upstreams
from benchmarks.peers.pages import SITUATION, read, reported
from codedinvnet.common.errors import UserError
from codedinvnet.evaluation.tables import markdown
from codedinvnet.simulation.figures import simulate
from codedinvnet.simulation.scenario import Scenario

POLICIES = {"ours-hedge": "hedge", "ours-uncoded": "uncoded"}
SEEDS = range(1, 6)
TRIP_MS = 0.6
"""Between gateway and server and back."""
FRONT_END = {"distribution": "exponential", "ms": 0.6, "plus_ms": 0.8}
"""What a request costs besides; both were found with nothing wrong at 20 and 40 % load, seed 1."""
BURSTS = {"kind": "bursts", "burst_factor": 4, "calm_ms": 1000, "burst_ms": 500}
"""As `benchmarks.load.arrivals`."""
WITHIN = 0.2
PERCENTILES = {"p50": "p50_ms", "p99": "p99_ms", "p99.9": "p999_ms"}
MS = 1000 * upstreams.SERVICE


def _all_slow(seconds: float) -> list[dict[str, Any]]:
    """Return the times at which all servers are slow."""
    starts = np.arange(0, seconds, upstreams.SLOW_PERIOD).tolist()
    one = {"kind": "factor", "factor": upstreams.ALL_SLOW}
    return [{**one, "from_s": at, "until_s": at + upstreams.SLOW_FOR} for at in starts]


def scenario(row: Mapping[str, Any], seed: int) -> Scenario | None:
    """Return the scenario of a row; None if its fault or its servers are not simulated."""
    fault, rate = row["fault"], row["load"] * row["servers"] / upstreams.mean_service(row["fault"])
    block: dict[str, Any] = {
        "ms": 1000 * upstreams.BLOCK,
        "most_ms": 1000 * upstreams.LONGEST_BLOCK,
    }
    block |= {"distribution": "pareto", "shape": upstreams.SHAPE}
    hit = {"probability": upstreams.SHARE, "delay": block}
    usual = {"distribution": "lognormal", "ms": MS, "shape": upstreams.SPREAD}
    faults: dict[str, dict[str, Any]] = {
        "none": {},
        "pareto": {"stragglers": [{"kind": "slow", **hit}]},
        "held": {"stragglers": [{"kind": "hold", **hit}]},
        "slow": {"stragglers": [{"kind": "factor", "worker": 0, "factor": upstreams.SLOW}]},
        "all-slow": {"stragglers": _all_slow(row["requests"] / rate)},
        "exponential": {"service": {"distribution": "exponential", "ms": MS}},
        "lognormal": {
            "service": {"distribution": "lognormal", "ms": MS * np.exp(-0.5), "shape": 1.0}
        },
        "sizes": {"long_share": upstreams.LONG_SHARE, "long": upstreams.LONG},
    }
    if (
        fault not in faults
        or row["peer"] not in POLICIES
        or row["kind"] != "timed"
        or row["instances"] > 1
    ):
        return None
    arrivals = {"qps": rate, **(BURSTS if row["bursty"] else {})}
    given = {
        **{"arrivals": arrivals, "workers": row["servers"], "queries": row["requests"]},
        **{"policy": POLICIES[row["peer"]], "slots": None, "cores": 1, "seed": seed},
        **{"service": usual, "trip": TRIP_MS, "front_end": FRONT_END, "deadline_ms": 30_000},
    }
    return Scenario.model_validate(given | faults[fault])


def table(path: Path) -> str:
    """Return measured and predicted percentiles of our gateway, and how many are close.

    Raises:
        UserError: if there are no such rows.
    """
    rows, lines, close = reported(read(path)), [], dict.fromkeys(PERCENTILES, 0)
    for place, found in rows[rows.peer.isin([*POLICIES])].groupby([*SITUATION, "peer"], sort=False):
        row = found.iloc[0].to_dict()
        made = [scenario(row, seed) for seed in SEEDS]
        if None in made:
            continue
        runs = [simulate(each) for each in made if each is not None]
        fault, load, servers, _, bursty, _, _, peer = place
        line = {
            "fault": fault,
            "load": load,
            "servers": servers,
            "bursts": "yes" if bursty else "",
            "policy": POLICIES[peer],
        }
        for name, key in PERCENTILES.items():
            measured, predicted = found[name].median(), median(run[key] for run in runs)
            close[name] += abs(predicted / measured - 1) <= WITHIN
            line[f"{name}, ms"], line["predicted " + name] = f"{measured:.0f}", f"{predicted:.0f}"
        lines.append(line)
    if not lines:
        raise UserError(f"--out: {path} has no row of our gateway that can be simulated")
    said = ", ".join(f"{name} {count}" for name, count in close.items())
    return f"{markdown(pd.DataFrame(lines)).strip()}\n\nwithin 20 %, of {len(lines)}: {said}"
