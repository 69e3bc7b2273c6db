from __future__ import annotations

import pytest
import torch

from codedinvnet.nn import head as heads
from codedinvnet.nn.fusion import mosaic_grid
from codedinvnet.nn.head import MosaicHead, RecoveryHead

SHAPE = (6, 2, 3)


def latents(count: int = 4) -> torch.Tensor:
    return torch.randn(count, *SHAPE, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("pooled", [False, True])
def test_each_evidence_moves_its_own_answer_only(
    pooled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(heads, "LARGEST_FLAT", 0 if pooled else 16384)
    torch.manual_seed(0)
    head = RecoveryHead(SHAPE, 3, hidden=8, side_features=4)
    z, side, direct = latents(), torch.randn(4, 4), torch.randn(4, 3)
    assert head(z, side, direct, 2).shape == (4, 3)
    assert torch.equal(head.from_latent(z, direct, 2), head(z, 0 * side, direct, 2))
    assert not torch.allclose(head.from_latent(z + 1, direct, 2), head.from_latent(z, direct, 2))
    assert not torch.allclose(head.from_side(side + 1), head.from_side(side))
    torch.testing.assert_close(
        head(z, side, direct, 2) - head(z, side, 0 * direct, 2), direct * (0.0 + 1.0 / 2)
    )
    same_places = torch.allclose(head(z.flip(2), side, direct, 2), head(z, side, direct, 2))
    assert same_places is pooled


@pytest.mark.parametrize("members", [1, 2, 3, 4, 5, 8, 10, 16])
def test_each_member_is_read_from_its_own_cell(members: int) -> None:
    torch.manual_seed(0)
    head = MosaicHead((6, 4, 4), 3, hidden=8, side_features=2, readings=5)
    z = torch.randn(2, 6, 4, 4)
    before = head.read(z, members)
    assert before.shape == (2, members, 5)
    rows, columns = mosaic_grid(members)
    for member in range(members):
        changed = z.clone()
        row, column = divmod(member, columns)
        height, width = 4 // rows, 4 // columns
        changed[:, :, row * height : (row + 1) * height, column * width : (column + 1) * width] += (
            1.0
        )
        moved = (head.read(changed, members) - before).abs().amax((0, 2)) > 1e-6
        assert moved.tolist() == [place == member for place in range(members)]


def test_side_features_and_readings_each_answer_alone() -> None:
    torch.manual_seed(0)
    head = MosaicHead((6, 4, 4), 3, hidden=8, side_features=2, readings=5)
    evidence = torch.randn(4, 7)
    side, readings = evidence[:, :2], evidence[:, 2:]
    assert head(evidence).shape == (4, 3)
    zeros = torch.zeros(4, 5)
    torch.testing.assert_close(head.from_side(evidence), head(torch.cat([side, zeros], 1)))
    torch.testing.assert_close(
        head.from_latent(evidence), head(torch.cat([zeros[:, :2], readings], 1))
    )
    assert not torch.allclose(head.from_side(evidence), head(evidence))
    assert not torch.allclose(head.from_latent(evidence), head(evidence))
