"""Methods whose extra worker runs one network on a whole group: Collage."""

from __future__ import annotations

import pytest
import torch

from codedinvnet.codes.collage import Collage, CollageNetwork, collage_grid
from codedinvnet.codes.equal_cost import count_macs, served_macs
from codedinvnet.codes.grouped import GroupMethod
from codedinvnet.codes.method import Given, given_by
from codedinvnet.codes.registry import find_method
from codedinvnet.models.bundle import load_bundle
from tests.codes.linear import CLASSES, SHAPE, Linear, assert_extra_task_answers, images, made

K = 4


@pytest.mark.parametrize("size", range(1, K + 1))
def test_every_erasure_pattern_is_answered_by_the_network(size: int) -> None:
    torch.manual_seed(0)
    served = Linear()
    part = Collage().network(Given(K, served, SHAPE, CLASSES), width=4).eval().double()
    group = images(size)
    with torch.no_grad():
        extra = part(group)
    assert_extra_task_answers(made(Collage, served, K, part=part), served, group, extra)


@pytest.mark.parametrize(("k", "grid"), [(2, (1, 2)), (4, (2, 2)), (9, (3, 3)), (10, (3, 4))])
def test_a_collage_holds_every_member_in_its_cell(k: int, grid: tuple[int, int]) -> None:
    part = CollageNetwork(k, (1, 28, 28), 10, width=2)
    assert collage_grid(k) == part.grid == grid
    shades = torch.arange(1.0, k + 1) / k
    picture = part.collage(shades.view(1, k, 1, 1, 1).expand(1, k, 1, 28, 28))
    rows, columns = grid
    height, width = part.cell
    assert picture.shape == (1, 1, rows * height, columns * width)
    cells = picture.view(rows, height, columns, width).transpose(1, 2).flatten(0, 1)
    expected = torch.cat([shades, torch.zeros(rows * columns - k)])
    torch.testing.assert_close(cells, expected[:, None, None].expand_as(cells))


@pytest.mark.parametrize("name", ["collage", "collage@1.4"])
def test_a_network_is_as_wide_as_its_cost_allows(name: str) -> None:
    method, given = find_method(name), given_by(load_bundle("mnist"), K)
    assert isinstance(method, GroupMethod)
    width = method.made_with(given, None)["width"]

    def spent(width: int) -> int:
        part = method.untrained(given, {"width": width}).eval()
        return count_macs(lambda: part(torch.zeros(1, K, *given.shape)))

    cost = 1.4 if name.endswith("1.4") else 1.0
    assert spent(width) <= cost * served_macs(given.coded) < spent(width + 1)
    assert [method.rules(K).tasks(size)[K].cost for size in (1, K)] == [cost, cost]
