from __future__ import annotations

import time
from collections.abc import Callable

import pytest
import torch

from benchmarks import timing


class Clock:
    """Stands still but for the arms, which move it on."""

    def __init__(self) -> None:
        self.now = 100.0
        self.calls: list[str] = []

    def perf_counter(self) -> float:
        return self.now

    def arm(self, name: str, *seconds: float) -> Callable[[], None]:
        left = list(seconds)

        def call() -> None:
            self.calls.append(name)
            self.now += left.pop(0) if len(left) > 1 else left[0]

        return call


def test_arms_take_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock()
    monkeypatch.setattr(time, "perf_counter", clock.perf_counter)
    times = timing.interleave(
        {"slow": clock.arm("slow", 9.0, 4.0), "fast": clock.arm("fast", 1.0, 0.4)},
        rounds=3,
        seconds=1.0,
        device=torch.device("cpu"),
        label="test",
    )
    assert times["slow"] == pytest.approx([4000.0] * 3)
    assert times["fast"] == pytest.approx([400.0] * 3)
    warm = ["slow", "fast", "fast"]
    forward, backward = ["slow", *["fast"] * 3], [*["fast"] * 3, "slow"]
    assert clock.calls == [*warm, *forward, *backward, *forward]


def test_a_ratio_is_that_of_the_medians() -> None:
    times = {"slow": [2.0, 4.0, 9.0], "fast": [1.0, 1.0, 3.0]}
    found = timing.comparison("it", times, "fast", {"slow": 0.1}, {"slow": 3})
    assert found["ms"] == {"slow": 4.0, "fast": 1.0}
    assert found["faster"] == {"slow": {"times": 4.0, "rounds": [2.0, 4.0], "aim": 3}}
    assert (found["fast"], found["errors"]) == ("fast", {"slow": 0.1})
