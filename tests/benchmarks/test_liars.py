"""Faulty workers of the shipped bundle for MNIST: their labels change, and they are named."""

from __future__ import annotations

import numpy as np
import pytest

from benchmarks import liars
from codedinvnet.data import sample_images
from codedinvnet.models.bundle import load_bundle


@pytest.fixture(scope="module")
def at() -> liars.Setting:
    return liars.setting(load_bundle("mnist"), sample_images("mnist"), seed=0)


@pytest.mark.parametrize("fault", liars.FAULTS)
def test_a_faulty_worker_is_named(fault: str, at: liars.Setting) -> None:
    rows = np.arange(200)
    wrong = liars.FAULTS[fault](at, np.random.default_rng(0))(rows) != at.labels(at.outputs[:200])
    assert wrong.mean() >= 0.05
    answers, off = liars.until_named(at, 11, fault, seed=1)
    assert off == 0
    assert 0 < answers < liars.MOST_ANSWERS


def test_sound_workers_are_not_named(at: liars.Setting) -> None:
    alarms, cost = liars.false_alarms(at, 11, 0, 20_000)
    assert alarms == 0
    assert cost > 0
