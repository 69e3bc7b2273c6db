"""Times, and the one rule of what is too slow."""

from __future__ import annotations

import time

import pytest

from codedinvnet.protect import costs


def test_calls_are_timed_in_turn_when_warm() -> None:
    order = []

    def call(name: str, seconds: float) -> None:
        order.append(name)
        time.sleep(seconds)

    found = costs.milliseconds(
        {"slow": lambda: call("slow", 0.004), "quick": lambda: call("quick", 0)}
    )
    assert found["slow"].low > found["quick"].value
    assert order[:4] == ["slow", "quick"] * 2
    assert len(order) >= 2 * (costs.FEWEST + 1)


@pytest.mark.parametrize(
    ("work", "why"), [(0.1, ""), (0.5, ""), (0.51, "0.51 of the model's time")]
)
def test_what_takes_more_than_half_of_the_models_time_is_too_slow(work: float, why: str) -> None:
    assert costs.too_slow(work).startswith(why and "it takes")
    assert why in costs.too_slow(work)
