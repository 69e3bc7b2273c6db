"""How well simulations meet measurements: a check that a wrong simulation fails.

Each figure stands beside the one that a *wrong policy's* simulation reaches: every measured arm is
compared with the simulations of the other arms of its setting.
"""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

TOLERANCE = 0.15
"""A simulated percentile is near if it is within so much of the measured one."""
APART = 1.25
"""The order of two arms is judged where one has measured so many times the other."""


class Pair(NamedTuple):
    """A percentile in ms, on both sides."""

    measured: float
    simulated: float

    @property
    def error(self) -> float:
        """The share of the measured one that the simulated one is off by."""
        return abs(self.simulated / self.measured - 1)


class Figures(NamedTuple):
    """How well simulated percentiles meet measured ones.

    Attributes:
        cells: percentiles that are finite on both sides.
        near: those within TOLERANCE.
        median_error: of all of them.
        pairs: of arms of one setting that differ by APART as measured.
        ordered: those that the simulation has in the same order.
    """

    cells: int
    near: int
    median_error: float
    pairs: int
    ordered: int


class Check(NamedTuple):
    """What simulations reach, and what those of wrong policies do."""

    own: Figures
    wrong: Figures


def setting_of(arm: Mapping[str, Any]) -> str:
    """Return what the arms of one setting share; its name says it in front of the method."""
    return str(arm["name"]).rpartition(": ")[0]


def check(arms: Sequence[Mapping[str, Any]]) -> Check | None:
    """Return how well arms are met; None if no percentile is finite on both sides.

    Args:
        arms: each with its `name`, and the `percentiles` that `measured.compare` returned.
    """
    settings: dict[str, list[Mapping[str, Any]]] = {}
    for arm in arms:
        settings.setdefault(setting_of(arm), []).append(arm["percentiles"])
    own, wrong = list(_tables(settings.values(), (0,))), []
    for setting in settings.values():
        wrong += list(_tables([setting], range(1, len(setting))))
    found = figures(own)
    return None if found is None else Check(found, figures(wrong) or Figures(0, 0, 0.0, 0, 0))


def _tables(
    settings: Iterable[Sequence[Mapping[str, Any]]], shifts: Iterable[int]
) -> Iterator[list[Pair]]:
    """Yield for each setting and percentile the arms, each with the simulation so many behind."""
    for setting, shift in itertools.product(settings, tuple(shifts)):
        for name in dict.fromkeys(itertools.chain.from_iterable(setting)):
            pairs = []
            for place, cells in enumerate(setting):
                other = setting[(place + shift) % len(setting)]
                values = (
                    cells.get(name, {}).get("measured_ms"),
                    other.get(name, {}).get("simulated_ms"),
                )
                if None not in values:
                    pairs.append(Pair(*values))
            yield pairs


def figures(tables: Sequence[Sequence[Pair]]) -> Figures | None:
    """Return the figures of percentiles, those of one setting together; None without any."""
    cells = [pair for table in tables for pair in table]
    if not cells:
        return None
    apart = [
        (low, high)
        for table in tables
        for low, high in itertools.permutations(table, 2)
        if high.measured >= APART * low.measured
    ]
    return Figures(
        len(cells),
        sum(pair.error <= TOLERANCE for pair in cells),
        statistics.median(pair.error for pair in cells),
        len(apart),
        sum(low.simulated < high.simulated for low, high in apart),
    )


def told(found: Check) -> str:
    """Return the figures in words."""
    own, wrong = found
    return (
        f"{_share(own.near, own.cells)} of {own.cells} percentiles are within {TOLERANCE:.0%} of "
        f"the measured ones (a wrong policy's simulation: {_share(wrong.near, wrong.cells)}). The "
        f"median error is {own.median_error:.1%} ({wrong.median_error:.1%}). Of {own.pairs} pairs "
        f"of policies that differ by a quarter or more, {_share(own.ordered, own.pairs)} are in "
        f"the measured order ({_share(wrong.ordered, wrong.pairs)})."
    )


def _share(part: int, whole: int) -> str:
    return f"{part / whole:.0%}" if whole else "none"
