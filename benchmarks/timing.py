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
        rounds: of every comparison.
        seconds: that each arm runs in a round, at least.
        batch: images inverted, or trained on, at once.
        embed_batches: images embedded at once.
        plain_iterations: of the plain inverse.
    """

    rounds: int
    seconds: float
    batch: int = 128
    embed_batches: tuple[int, ...] = (1, 128)
    plain_iterations: int = 100


FULL = Sizes(rounds=15, seconds=0.5)
QUICK = Sizes(rounds=3, seconds=0.1)

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


def comparison(
    what: str,
    times: Times,
    fast: str,
    errors: Mapping[str, float] = {},
    aims: Mapping[str, float] = {},
) -> dict[str, Any]:
    """Return what a comparison came to, as a row has it.

    Args:
        what: was computed.
        times: of each arm, in ms.
        fast: the arm that the others are compared with.
        errors: of what arms computed, the largest.
        aims: arm -> how many times as fast the fast one was meant to be.
    """
    faster = {}
    for slow in (name for name in times if name != fast):
        rounds = [a / b for a, b in zip(times[slow], times[fast], strict=True)]
        ratio = statistics.median(times[slow]) / statistics.median(times[fast])
        faster[slow] = {
            "times": round(ratio, 3),
            "rounds": [round(min(rounds), 3), round(max(rounds), 3)],
            "aim": aims.get(slow),
        }
    ms = {name: round(statistics.median(values), 4) for name, values in times.items()}
    return {"what": what, "ms": ms, "errors": dict(errors), "fast": fast, "faster": faster}
