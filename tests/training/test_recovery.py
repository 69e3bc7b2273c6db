from __future__ import annotations

from collections import Counter

import pytest
import torch

from codedinvnet.nn.fusion import mosaic_grid
from codedinvnet.training.recovery import draw_size

DRAWS = 4000


def drawn(largest: int, apart: bool) -> Counter[int]:
    generator = torch.Generator().manual_seed(0)
    return Counter(draw_size(largest, apart, generator) for _ in range(DRAWS))


@pytest.mark.parametrize("largest", [2, 10])
def test_every_size_is_drawn_equally_often(largest: int) -> None:
    counts = drawn(largest, apart=False)
    assert sorted(counts) == list(range(2, largest + 1))
    for count in counts.values():
        assert count == pytest.approx(DRAWS / (largest - 1), rel=0.15)


@pytest.mark.parametrize(("largest", "grids"), [(2, 1), (3, 2), (10, 4)])
def test_every_grid_of_a_mosaic_is_drawn_equally_often(largest: int, grids: int) -> None:
    sizes = drawn(largest, apart=True)
    assert sorted(sizes) == list(range(2, largest + 1))
    counts: Counter[tuple[int, int]] = Counter()
    for size, count in sizes.items():
        counts[mosaic_grid(size)] += count
    assert len(counts) == grids
    for count in counts.values():
        assert count == pytest.approx(DRAWS / grids, rel=0.15)
