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
from codedinvnet.evaluation.tables import markdown
from codedinvnet.simulation.figures import simulate
from codedinvnet.simulation.scenario import Scenario

POLICIES = {"ours-hedge": "hedge", "ours-uncoded": "uncoded"}
SEEDS = range(1, 6)
TRIP_MS, FRONT_END_MS = 0.6, 0.6
"""Between gateway and server and back, and what a request costs besides."""
WITHIN = 0.2
PERCENTILES = {"p50": "p50_ms", "p99": "p99_ms", "p99.9": "p999_ms"}
MS = 1000 * upstreams.SERVICE


def _block() -> dict[str, Any]:
    """Return the distribution of blocks: Pareto, and none is longer than the longest."""
    shares = [*(1 - np.geomspace(1, 1e-3, 200)[:-1]).tolist(), 1.0]
    left = np.maximum(1 - np.array(shares), 1e-9)
    values = np.minimum(upstreams.BLOCK * left ** (-1 / upstreams.SHAPE), upstreams.LONGEST_BLOCK)
    found = {"shares": shares, "values_ms": (1000 * values).tolist()}
    return {"distribution": "empirical", **found}


def _all_slow(seconds: float) -> list[dict[str, Any]]:
    """Return the times at which all servers are slow."""
    starts = np.arange(0, seconds, upstreams.SLOW_PERIOD).tolist()
    one = {"kind": "factor", "factor": upstreams.ALL_SLOW}
    return [{**one, "from_s": at, "until_s": at + upstreams.SLOW_FOR} for at in starts]


def scenario(row: Mapping[str, Any], seed: int) -> Scenario | None:
    """Return the scenario of a row; None if its fault or its arrivals are not simulated."""
    fault, rate = row["fault"], row["load"] * row["servers"] / upstreams.mean_service(row["fault"])
    hit = {"probability": upstreams.SHARE, "delay": _block()}
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
    if fault not in faults or row["peer"] not in POLICIES or row["bursty"]:
        return None
    given = {
        **{"arrivals": {"qps": rate}, "workers": row["servers"], "queries": row["requests"]},
        **{"policy": POLICIES[row["peer"]], "slots": None, "cores": 1, "seed": seed},
        **{"service": usual, "trip": TRIP_MS, "front_end": FRONT_END_MS, "deadline_ms": 30_000},
    }
    return Scenario.model_validate(given | faults[fault])


def table(path: Path) -> str:
    """Return measured and predicted percentiles of our gateway, and how many are close."""
    rows, lines, close = reported(read(path)), [], dict.fromkeys(PERCENTILES, 0)
    for place, found in rows[rows.peer.isin([*POLICIES])].groupby([*SITUATION, "peer"], sort=False):
        row = found.iloc[0].to_dict()
        made = [scenario(row, seed) for seed in SEEDS]
        if None in made:
            continue
        runs = [simulate(each) for each in made if each is not None]
        fault, load, servers, _, _, peer = place
        line = {"fault": fault, "load": load, "servers": servers, "policy": POLICIES[peer]}
        for name, key in PERCENTILES.items():
            measured, predicted = found[name].median(), median(run[key] for run in runs)
            close[name] += abs(predicted / measured - 1) <= WITHIN
            line[f"{name}, ms"], line["predicted " + name] = f"{measured:.0f}", f"{predicted:.0f}"
        lines.append(line)
    said = ", ".join(f"{name} {count}" for name, count in close.items())
    return f"{markdown(pd.DataFrame(lines)).strip()}\n\nwithin 20 %, of {len(lines)}: {said}"
