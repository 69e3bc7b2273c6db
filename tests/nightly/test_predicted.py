"""What the simulator says of our gateway's cells, from the parameters of load and fault alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from statistics import median
from typing import Any

import numpy as np
import pytest

from benchmarks.peers import ROWS, upstreams
from benchmarks.peers.pages import SITUATION, read, reported
from benchmarks.peers.trials import Trial
from codedinvnet.simulation.figures import simulate
from codedinvnet.simulation.scenario import Scenario

pytestmark = pytest.mark.nightly
POLICIES = {"ours-hedge": "hedge", "ours-uncoded": "uncoded"}
SEEDS = range(1, 6)
TRIP_MS = 0.6
"""Between gateway and server and back."""
FRONT_END = {"distribution": "exponential", "ms": 0.6, "plus_ms": 0.8}
"""What a request costs besides; both were found with nothing wrong at 20 and 40 % load, seed 1."""
BURSTS = {"kind": "bursts", "burst_factor": 4, "calm_ms": 1000, "burst_ms": 500}
"""As `benchmarks.load.arrivals`."""
WITHIN, LEAST = 0.2, 0.7
"""How close a prediction should be, and in which share of the situations."""
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


def test_most_of_the_gateways_rows_are_predicted() -> None:
    rows, close, places = reported(read(ROWS)), dict.fromkeys(PERCENTILES, 0), 0
    for place, found in rows[rows.peer.isin([*POLICIES])].groupby([*SITUATION, "peer"], sort=False):
        made = [scenario(found.iloc[0].to_dict(), seed) for seed in SEEDS]
        if None in made:
            continue
        runs = [simulate(each) for each in made if each is not None]
        places += 1
        for name, key in PERCENTILES.items():
            measured, predicted = found[name].median(), median(run[key] for run in runs)
            close[name] += abs(predicted / measured - 1) <= WITHIN
            print(*place, name, measured, predicted)
    print(close, places)
    assert all(count >= LEAST * places for count in close.values())


def test_the_simulator_knows_what_hedging_is_worth() -> None:
    row = {**asdict(Trial("ours-hedge", "held", 0.4, requests=2000))}
    made = [scenario({**row, "peer": peer}, 1) for peer in ("ours-uncoded", "ours-hedge")]
    uncoded, hedged = (simulate(one) for one in made if one is not None)
    assert uncoded["p999_ms"] > 3 * hedged["p999_ms"]
