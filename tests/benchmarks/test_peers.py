"""The benchmark of proxies: its servers and arrivals, and a short run of each proxy."""

from __future__ import annotations

import signal
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from benchmarks.load import arrivals
from benchmarks.peers import FAULTS as PLANNED
from benchmarks.peers import PLAN, SEVERAL, best_tuning, planned, run
from benchmarks.peers.contenders import CONTENDERS
from benchmarks.peers.pages import read, several_of, stale, summary, table
from benchmarks.peers.trials import Trial, measure, stops
from benchmarks.peers.upstreams import (
    BLOCK,
    CROWD,
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


def test_other_clients_take_their_share_of_every_second_server() -> None:
    crowded, own = (Server(n, Spec([1], 0, "antagonists", seed=3)) for n in (0, 1))
    crowded.queue(1.0)
    waits = [crowded.queue(at) - at for at in np.arange(1, 200, 0.011)]
    assert np.mean(np.array(waits) > 0) == pytest.approx(CROWD, rel=0.1)
    assert own.queue(1.0) == 1.0
    assert own.queue(100.0) == 100.0


def measured(trial: Trial) -> dict[str, Any]:
    try:
        return measure(trial)
    except UserError as error:
        if "not installed" not in str(error):
            raise
        pytest.skip(str(error))


RIVALS = ("haproxy-leastconn", "nginx", "envoy-least-request")
PROXIES = (*RIVALS, "ours-hedge")


@pytest.mark.parametrize(
    ("peer", "kind"),
    [
        ("ours-hedge", "timed"),
        ("ours-hedge", "streams"),
        *(pytest.param(peer, "timed", marks=pytest.mark.nightly) for peer in RIVALS),
        pytest.param("vllm-router", "streams", marks=pytest.mark.nightly),
    ],
)
def test_a_contender_answers_all_requests(peer: str, kind: str) -> None:
    row = measured(Trial(peer, "none", 0.5, requests=200, kind=kind))
    assert (row["errors"], row["wrong"]) == (0, 0)
    assert row["p50"] >= 1000 * SERVICE * 0.9
    assert row["busy"] == pytest.approx(SERVICE, rel=0.15)


@pytest.mark.nightly
@pytest.mark.parametrize("peer", PROXIES)
def test_a_rivals_configuration_keeps_a_failing_servers_errors_from_clients(peer: str) -> None:
    """Of 600 requests an eighth would fail."""
    row = measured(Trial(peer, "garbage", 0.4, requests=200, instances=2))
    assert row["errors"] <= 3
    assert row["wrong"] == 0


@pytest.mark.nightly
def test_nobody_repeats_what_nobody_called_safe() -> None:
    for peer in PROXIES:
        row = measured(Trial(peer, "garbage", 0.4, requests=200, kind="unnamed"))
        assert row["statuses"]["HTTP 503"] == row["errors"] > 0
        assert row["work"] < 1


def test_a_plan_has_what_suits_each_contender() -> None:
    found = [*planned(PLAN, 3, requests=100)]
    assert len({*found}) == len(found)
    assert {trial.fault for trial in found} == {*PLANNED, STOPPED}
    assert {trial.kind for trial in found if trial.peer == "vllm-router"} == {"streams"}
    assert "envoy-hedge" not in {trial.peer for trial in found if trial.kind == "unnamed"}


def test_members_are_several() -> None:
    found = {(trial.peer, trial.instances) for trial in planned(SEVERAL, 1, requests=100)}
    own = {(peer, n) for peer, n in found if peer in ("ours-members", "ours-hedge")}
    alone = {("ours-hedge", n) for n in (1, 2, 4)}
    assert own == {("ours-members", 2), ("ours-members", 4), *alone}


def keep(
    file: Path,
    trial: Trial,
    p999: float,
    settings: Mapping[str, str] | None = None,
    more: Mapping[str, float] | None = None,
) -> None:
    """Append a row of today's configuration, or of another one."""
    how = CONTENDERS[trial.peer].settings if settings is None else settings
    figures = {"p99.9": p999, "errors": 0, **(more or {})}
    append_row(file, Cell("peers", asdict(trial), how, lambda: figures).row())


def test_rows_of_another_configuration_are_stale_and_measured_again(tmp_path: Path) -> None:
    file, trial = tmp_path / "rows.jsonl", Trial("nginx", "slow", 0.4, requests=3000)
    keep(file, trial, 20.0, {"configuration": "old"})
    assert "`nginx`" in stale(read(file))
    keep(file, trial, 10.0)
    assert [*read(file)["p99.9"]] == [10.0]
    assert stale(read(file)) == ""


def test_finished_cells_are_kept_and_tuned_ones_take_the_best_of_their_sweep(
    tmp_path: Path,
) -> None:
    file = tmp_path / "rows.jsonl"
    situation = {"fault": "slow", "load": 0.4, "servers": 8, "slots": 1, "bursty": False}
    situation |= {"kind": "timed", "instances": 1}
    swept = [
        {"peer": "envoy-hedge", **situation, "seed": 101, "tuning": tuning, "p99.9": p999}
        for tuning, p999 in ((0.015, 90.0), (0.05, 60.0))
    ]
    assert best_tuning(pd.DataFrame(swept), Trial("envoy-hedge", "slow", 0.4)) == 0.05
    for peer, p999 in (("nginx", 20.0), ("ours-hedge", 10.0)):
        keep(file, Trial(peer, "slow", 0.4, requests=3000), p999)
    report = run(
        quick=True,
        several=False,
        only=["peer=nginx", "peer=ours-hedge", "fault=slow"],
        seeds=None,
        requests=3000,
        out=file,
    )
    assert "| slow, 40 % | 20 | **10** |" in report["table"]


def test_the_summary_is_of_situations_with_a_rival_and_names_those_that_are_lost(
    tmp_path: Path,
) -> None:
    file = tmp_path / "rows.jsonl"
    for peer, fault, p999 in (
        *(("ours-hedge", "none", 10.0), ("haproxy-leastconn", "none", 20.0)),
        *(("ours-hedge", "sizes", 30.0), ("haproxy-leastconn", "sizes", 20.0)),
        ("ours-hedge", "killed", 15.0),
    ):
        usual = dict.fromkeys(("p50", "p90", "p99", "work", "goodput"), 1.0)
        keep(file, Trial(peer, fault, 0.4), p999, more=usual)
    found = summary(read(file))
    assert "In 1 of 2 situations" in found
    assert "higher with: sizes, 40 % (1.50 times `haproxy-leastconn`)." in found
    assert "| killed, 40 % |  | 15 |" in table(read(file))


def test_the_table_of_several_instances_compares_members_with_one_gateway(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    for peer, instances, factor in (
        *(("ours-hedge", 1, 1.0), ("ours-hedge", 4, 3.0)),
        *(("ours-members", 4, 1.1), ("haproxy-leastconn", 4, 2.0)),
    ):
        for load in (0.4, 0.9):
            levels = {"p50": 10 * factor, "p90": 20 * factor, "p99": 100 * factor * load}
            cost = {"work": 1.0 + factor / 100, "processor_ms": 0.4 * factor}
            trial = Trial(peer, "none", load, instances=instances)
            keep(file, trial, 40 * factor, more={**levels, **cost})
    found = several_of(read(file))
    assert "| none, 40 %, 4 | **44** | 120 | 80 |" in found
    assert "| none, 90 %, 4 | **11 / 22 / 99** | 30 / 60 / 270 | 20 / 40 / 180 |" in found
    assert "under 1 of 1 faults" in found
    assert "in 3 of 3 figures" in found
    assert "takes +0.04 ms of a core" in found
