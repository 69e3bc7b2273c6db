"""The watch on a limit: drift stops releasing, its end resumes it."""

from __future__ import annotations

import math

import numpy as np
import pytest

from codedinvnet.serving.watch import BARS, MOST, Watch

BARE = BARS[None]


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


@pytest.mark.parametrize(("guessed", "wrong"), [(None, 0.005), (0.015, 0.007)])
def test_what_keeps_the_limit_is_rarely_stopped(guessed: float | None, wrong: float) -> None:
    """Not even if the extra tasks err half as often again as the calibration says."""
    random = np.random.default_rng(0)
    watch, stops = Watch(0.01), 0
    for _ in range(20_000):
        if guessed is not None:
            watch.guessed(random.binomial(10, guessed), 0.1)
            assert not watch.drifting
        changed = watch.compared(True, bool(random.random() >= wrong))
        stops += changed and not watch.releasing
    assert stops <= 2


def test_only_comparisons_that_would_be_released_count() -> None:
    watch = Watch(0.01)
    for _ in range(100):
        assert not watch.compared(False, False)
    assert watch.releasing
    assert watch.comparisons == 100
    changes = [watch.compared(True, False) for _ in range(math.ceil(BARE.stop) + 1)]
    assert changes.index(True) == math.ceil(BARE.stop)  # as if there had been none
    assert changes.count(True) == 1
    assert not watch.releasing
    until = next(n for n in range(1, 1000) if watch.compared(True, True))
    assert watch.releasing
    assert until == pytest.approx(BARE.resume / (BARE.credit * 0.01), abs=1)


def test_weak_drift_makes_it_strict_until_it_is_over() -> None:
    """Twice the limit of what is less sure disagrees, and nothing of what is sure."""
    random = np.random.default_rng(0)
    watch, released, wrong = Watch(0.01), 0, 0
    for place in range(20_000):
        sure = bool(random.random() < 0.5)
        agrees = sure or bool(random.random() >= 0.026)
        if watch.releasing and (sure or not watch.strict):
            released, wrong = released + (place >= 500), wrong + (place >= 500 and not agrees)
        assert not watch.compared(True, agrees, sure)
    assert wrong / released < 0.01  # and 1.3 % without
    assert released > 10_000
    for _ in range(math.ceil(MOST / 0.01) + 1):
        watch.compared(True, True, True)
    assert not watch.strict


def test_drift_ends_with_what_extra_tasks_say() -> None:
    random = np.random.default_rng(0)
    watch = Watch(0.01, releasing=False)
    for _ in range(500):
        watch.guessed(random.binomial(10, 0.25), 0.1)
        watch.compared(True, bool(random.random() >= 0.026))
    assert watch.drifting
    assert not watch.releasing
    ends = 0
    while not watch.releasing:
        watch.guessed(random.binomial(10, 0.01), 0.1)
        watch.compared(True, bool(random.random() >= 0.0057))
        ends += 1
    assert watch.drifting is False
    assert ends < 2000
