"""Further cases of what `make test` tries, which go the same way and take as long."""

from __future__ import annotations

import signal
from itertools import product
from pathlib import Path

import pytest

from tests.e2e.test_serve import check_stop
from tests.processes import needs_proc
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


def test_training_a_mosaic_on_the_shipped_images_beats_chance_by_far(tmp_path: Path) -> None:
    check_training("mosaic", tmp_path)


@needs_proc
def test_a_managers_stop_while_a_service_starts(tmp_path: Path) -> None:
    check_stop(signal.SIGTERM, tmp_path)
