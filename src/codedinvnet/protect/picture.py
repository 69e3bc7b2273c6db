"""The picture of a protection: coverage against agreement, one line a method."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from codedinvnet.files import write_picture
from codedinvnet.protect.measure import Candidate, curve

SHOWN = 0.02
"""Coverage from which on lines are drawn: the first answers alone say nothing."""


def draw(path: Path, candidates: Sequence[Candidate]) -> None:
    """Draw the test inputs' coverage and agreement, each line with its name at its end."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.0, 4.0), layout="constrained")
    axes = figure.subplots()
    ends = []
    for number, candidate in enumerate(candidates):
        coverage, agreement = curve(candidate.test.confidence, candidate.test.agrees)
        shown = coverage >= SHOWN
        axes.plot(100 * coverage[shown], 100 * agreement[shown], color=f"C{number}", linewidth=2)
        ends.append(100 * float(agreement[-1]))
    low, _ = axes.get_ylim()
    axes.set_ylim(low, 100.5)
    gap = (100.5 - low) / 16
    for number, height in zip(np.argsort(ends), _apart(sorted(ends), gap), strict=True):
        axes.annotate(
            candidates[number].name, (101, height), color=f"C{number}", va="center", fontsize=10
        )
    axes.set_xlim(0, 135)
    axes.set_xticks(range(0, 101, 20))
    axes.set_xlabel("coverage: share of late answers that are released, %")
    axes.set_ylabel("agreement with the model, %")
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    write_picture(path, figure)


def _apart(heights: list[float], gap: float) -> list[float]:
    """Return rising heights that are no closer than a gap."""
    found: list[float] = []
    for height in heights:
        found.append(height if not found else max(height, found[-1] + gap))
    return found
