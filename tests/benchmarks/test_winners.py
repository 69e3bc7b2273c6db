from __future__ import annotations

from pathlib import Path

import pytest
from matplotlib.colors import to_rgba
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from benchmarks import winners as drawing
from codedinvnet.serving.policies import SERVED
from codedinvnet.simulation.sweep import frame_of, winners
from tests.simulation.test_sweep import ROWS, row


def test_the_map_has_a_place_for_every_winner(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [*ROWS, row(0.2, "coded+hedge", None, stragglers="none", batch=10)]  # no policy wins
    figures: list[Figure] = []
    monkeypatch.setattr(drawing, "write_picture", lambda _, figure: figures.append(figure))
    drawing.draw_map(frame_of(rows), Path("map.png"))
    first, second = figures[0].axes
    drawn = {patch.get_xy(): patch for patch in first.patches if isinstance(patch, Rectangle)}
    best = winners(frame_of(ROWS))
    assert len(drawn) == len(best)
    for line in best.itertuples():
        patch = drawn[[0.2, 0.5, 0.8].index(line.load), 0]
        assert patch.get_facecolor()[:3] == to_rgba(drawing.colour(line.policy))[:3]
        assert (patch.get_alpha() == drawing.PALE) == line.contested
    (never,) = second.patches
    assert to_rgba("white")[:3] == never.get_facecolor()[:3]


def test_every_policy_has_a_colour_of_its_own() -> None:
    colours = [drawing.colour(name) for name in SERVED]
    assert len({*colours, drawing.OTHER}) == len(SERVED) + 1
    assert drawing.colour("further") == drawing.OTHER
