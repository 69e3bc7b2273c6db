"""Further cases of what `make test` tries, which go the same way and take as long."""

from __future__ import annotations

import signal
from itertools import product
from pathlib import Path

import pytest

from codedinvnet.protect import distil
from codedinvnet.simulation.advise import AdviseOptions, advise
from codedinvnet.simulation.figures import simulate
from tests.e2e.test_gateway_protection import check_protection, ours
from tests.e2e.test_serve import check_stop
from tests.processes import needs_proc
from tests.simulation.recording import traffic
from tests.simulation.test_advise import QUERIES, URL, check_prediction, row, served
from tests.simulation.test_front_end import FAULTS, FAULTY, check_fault
from tests.training.test_objectives import check_training


@pytest.mark.parametrize(
    ("policy", "name"),
    [pair for pair in product(("uncoded", "coded+hedge"), FAULTS) if pair not in FAULTY],
)
def test_injected_faults_mean_the_same(
    policy: str, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    check_fault(policy, FAULTS[name], monkeypatch)


def test_another_policy_is_predicted() -> None:
    check_prediction("exponential", "coded", "hedge", 3 * QUERIES)


def test_held_answers_are_told_from_slow_workers() -> None:
    queries = 5 * QUERIES  # requests of ten: p99 is of 30 requests then
    held = served("coded", "held", 5, 10).updated(queries=queries)
    report = advise(
        traffic(held, offered=("uncoded", "coded")), AdviseOptions(URL, queries=queries)
    )
    kinds = [straggler["kind"] for straggler in report["stragglers"]]
    assert "hold" in kinds
    for policy in ("uncoded", "coded"):
        true = simulate(served(policy, "held", 77, 10).updated(queries=queries))
        assert row(report, policy)["p99_ms"] == pytest.approx(true["p99_ms"], rel=0.15)


def test_training_a_mosaic_on_the_shipped_images_beats_chance_by_far(tmp_path: Path) -> None:
    check_training("mosaic", tmp_path)


async def test_a_protection_made_of_our_own_service(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(distil, "MOST_ROUNDS", 20)
    with ours(tmp_path) as servers:
        await check_protection(servers, tmp_path)


@needs_proc
def test_a_managers_stop_while_a_service_starts(tmp_path: Path) -> None:
    check_stop(signal.SIGTERM, tmp_path)
