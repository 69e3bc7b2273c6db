"""The benchmark of proxies: its servers and arrivals, and a short run of each proxy."""

from __future__ import annotations

import signal
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from benchmarks.load import arrivals
from benchmarks.peers import best_tuning, run
from benchmarks.peers.predicted import scenario, table
from benchmarks.peers.trials import Trial, measure, stops
from benchmarks.peers.upstreams import (
    BLOCK,
    FAULTS,
    LONGEST_BLOCK,
    SERVICE,
    SHARE,
    STOPPED,
    Server,
    Spec,
    mean_service,
)
from codedinvnet.common.errors import UserError
from codedinvnet.common.grid import Cell, append_row
from codedinvnet.simulation.figures import simulate


@pytest.mark.parametrize("fault", FAULTS)
def test_work_of_a_server_is_what_capacity_counts_on(fault: str) -> None:
    server = Server(1, Spec([1], 0, fault, seed=3))
    seconds = [server.take(request, now=3.0)[0] for request in range(20_000)]
    usual = np.minimum(seconds, BLOCK) if fault == "pareto" else np.array(seconds)
    blocks = SHARE * BLOCK if fault == "pareto" else 0.0
    assert usual.mean() == pytest.approx(mean_service(fault) + blocks, rel=0.1)
    assert server.busy == pytest.approx(sum(seconds))


def test_the_first_server_alone_is_slow() -> None:
    slow, usual = (Server(n, Spec([1], 0, "slow")) for n in (0, 1))
    assert slow.take(0, 0.0)[0] > 5 * usual.take(0, 0.0)[0]


@pytest.mark.parametrize("bursty", [False, True])
def test_arrivals_have_the_rate_and_repeat(bursty: bool) -> None:
    times = arrivals(300, 20_000, 1, bursty=bursty)
    assert (np.diff(times) >= 0).all()
    assert len(times) / times[-1] == pytest.approx(300, rel=0.1)
    assert (times == arrivals(300, 20_000, 1, bursty=bursty)).all()


def test_a_stopped_server_goes_on_before_it_is_stopped_again() -> None:
    found = stops(Trial("nginx", STOPPED, 0.7, requests=20_000), [1, 2, 3])
    assert len(found) > 50
    assert [at for at, _, _ in found] == sorted(at for at, _, _ in found)
    for pid in (1, 2, 3):
        own = [(at, number) for at, each, number in found if each == pid]
        assert [n for _, n in own] == [signal.SIGSTOP, signal.SIGCONT] * (len(own) // 2)
        lasted = [end - start for (start, _), (end, _) in zip(own[::2], own[1::2], strict=True)]
        assert BLOCK <= min(lasted) <= max(lasted) <= LONGEST_BLOCK


PEERS = ("haproxy-leastconn", "nginx", "envoy-least-request", "ours-hedge", "ours-httpx")


@pytest.mark.parametrize(
    ("peer", "kind"), [*((peer, "timed") for peer in PEERS), ("ours-hedge", "streams")]
)
def test_a_contender_answers_all_requests(peer: str, kind: str) -> None:
    try:
        row = measure(Trial(peer, "none", 0.5, requests=200, kind=kind))
    except UserError as error:
        if "not installed" not in str(error):
            raise
        pytest.skip(str(error))
    assert (row["errors"], row["wrong"]) == (0, 0)
    assert row["p50"] >= 1000 * SERVICE * 0.9
    assert row["busy"] == pytest.approx(SERVICE, rel=0.15)


def test_the_gateways_rows_are_predicted(tmp_path: Path) -> None:
    file, measured = tmp_path / "rows.jsonl", {"p50": 9.2, "p99": 43.3, "p99.9": 56.1}
    for peer in ("ours-hedge", "nginx"):  # nginx is not simulated
        trial = Trial(peer, "exponential", 0.4, requests=3000)
        append_row(file, Cell("peers", asdict(trial), {}, lambda: measured).row())
    assert "within 20 %, of 1: p50 1, p99 1, p99.9 1" in table(file)
    uncoded, hedged = (
        simulate(one)
        for peer in ("ours-uncoded", "ours-hedge")
        if (one := scenario({**Trial(peer, "held", 0.4, requests=2000).__dict__}, 1)) is not None
    )
    assert uncoded["p999_ms"] > 3 * hedged["p999_ms"]


def test_finished_cells_are_kept_and_tuned_ones_take_the_best_of_their_sweep(
    tmp_path: Path,
) -> None:
    file = tmp_path / "rows.jsonl"
    situation = {"fault": "slow", "load": 0.4, "servers": 8, "slots": 1, "bursty": False}
    situation["kind"] = "timed"
    swept = [
        {"peer": "envoy-hedge", **situation, "seed": 101, "tuning": tuning, "p99.9": p999}
        for tuning, p999 in ((0.015, 90.0), (0.05, 60.0))
    ]
    assert best_tuning(pd.DataFrame(swept), Trial("envoy-hedge", "slow", 0.4)) == 0.05
    for peer, p999 in (("nginx", 20.0), ("ours-hedge", 10.0)):
        trial = Trial(peer, "slow", 0.4, requests=3000)
        append_row(file, Cell("peers", asdict(trial), {}, lambda: {"p99.9": p999}).row())  # noqa: B023
    report = run(
        quick=True,
        peer=["nginx", "ours-hedge"],
        fault=["slow"],
        load=None,
        slots=[1],
        servers=[8],
        seeds=None,
        requests=None,
        bursty=False,
        kind="timed",
        predict=False,
        out=file,
    )
    assert "| slow, 40 % | 20 | **10** |" in report["table"]
