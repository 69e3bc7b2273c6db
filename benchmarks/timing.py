"""Timing things beside each other, so that what else the machine does hits them alike.

They run in turn, round after round. A ratio is that of two medians; its spread is the smallest and
largest ratio of one round.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from tqdm import tqdm


@dataclass(frozen=True)
class Sizes:
    """How much is measured.

    Attributes:
        rounds: of every comparison but that with the slow plain inverse.
        plain_rounds: of that one.
        seconds: that each arm runs in a round, at least.
        batch: images inverted, or trained on, at once.
        embed_batches: images embedded at once.
        plain_iterations: of the plain inverse.
    """

    rounds: int
    plain_rounds: int
    seconds: float
    batch: int = 128
    embed_batches: tuple[int, ...] = (1, 128)
    plain_iterations: int = 100


FULL = Sizes(rounds=15, plain_rounds=5, seconds=0.5)
QUICK = Sizes(rounds=5, plain_rounds=1, seconds=0.1)

Arms = Mapping[str, Callable[[], Any]]
Times = Mapping[str, Sequence[float]]


def interleave(
    arms: Arms, *, rounds: int, seconds: float, device: torch.device, label: str
) -> dict[str, list[float]]:
    """Time the arms in turn.

    Args:
        arms: what to call, by name.
        rounds: how often each has its turn; every other round goes backwards.
        seconds: how long a turn lasts at least: fast arms are called more than once.
        device: is waited for before the clock is read.
        label: of the progress bar.

    Returns:
        For each arm one figure a round: ms of a call.
    """

    def turn(call: Callable[[], Any], count: int) -> float:
        _wait(device)
        began = time.perf_counter()
        for _ in range(count):
            call()
        _wait(device)
        return (time.perf_counter() - began) / count

    counts: dict[str, int] = {}
    times: dict[str, list[float]] = {name: [] for name in arms}
    names = list(arms)
    with tqdm(total=(rounds + 1) * len(arms), desc=label, unit="turn", dynamic_ncols=True) as bar:
        for name in names:
            first = turn(arms[name], 1)  # loads and allocates
            once = first if first > seconds else turn(arms[name], 1)
            counts[name] = max(1, math.ceil(seconds / once))
            bar.update()
        for number in range(rounds):
            for name in names if number % 2 == 0 else reversed(names):
                times[name].append(1000 * turn(arms[name], counts[name]))
                bar.update()
    return times


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def summary(times: Sequence[float]) -> dict[str, float]:
    """Return the median, smallest and largest of times in ms."""
    return {
        "median": round(statistics.median(times), 4),
        "min": round(min(times), 4),
        "max": round(max(times), 4),
    }


def ratio(name: str, times: Times, slow: str, fast: str) -> dict[str, Any]:
    """Return how many times faster one arm is: of the medians, and the spread over rounds."""
    rounds = [a / b for a, b in zip(times[slow], times[fast], strict=True)]
    return {
        name: round(statistics.median(times[slow]) / statistics.median(times[fast]), 3),
        f"{name}_spread": [round(min(rounds), 3), round(max(rounds), 3)],
    }
