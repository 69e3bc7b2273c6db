"""The watch on a limit: drift stops releasing, its end resumes it."""

from __future__ import annotations

import math

import numpy as np
import pytest

from codedinvnet.trust.watch import RESUME, STOP, Watch


def feed(watch: Watch, share: float, count: int, random: np.random.Generator) -> int | None:
    """Compare answers of which a share disagrees; return when something changed first."""
    for place in range(count):
        if watch.compared(True, bool(random.random() >= share)):
            return place + 1
    return None


@pytest.mark.parametrize("limit", [0.005, 0.01, 0.02])
def test_drift_stops_releasing_and_its_end_resumes_it(limit: float) -> None:
    stopped, resumed = [], []
    for seed in range(40):
        random = np.random.default_rng(seed)
        watch = Watch(limit)
        stopped.append(feed(watch, 5 * limit, 500, random))
        assert not watch.releasing or stopped[-1] is None
        watch = Watch(limit, releasing=False)
        resumed.append(feed(watch, limit / 2, 2000, random))
    assert sum(place is not None for place in stopped) >= 38
    assert sum(place is not None for place in resumed) >= 38


def test_what_keeps_the_limit_is_rarely_stopped() -> None:
    random = np.random.default_rng(0)
    watch = Watch(0.01)
    for _ in range(20_000):
        watch.compared(True, bool(random.random() >= 0.005))
    assert watch.stops <= 2


def test_only_comparisons_that_would_be_released_count() -> None:
    watch = Watch(0.01)
    for _ in range(100):
        assert not watch.compared(False, False)
    assert watch.releasing
    assert (watch.comparisons, watch.counted, watch.disagreed) == (100, 0, 0)


def test_it_is_deterministic_and_tells_of_each_change_once() -> None:
    watch = Watch(0.01)
    changes = [watch.compared(True, False) for _ in range(math.ceil(STOP) + 1)]
    assert changes.index(True) == math.ceil(STOP)
    assert changes.count(True) == watch.stops == 1
    again = 0
    while not watch.compared(True, True):
        again += 1
    assert watch.releasing
    assert again + 1 == pytest.approx(RESUME / (1.5 * 0.01), abs=1)
