from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from codedinvnet.common.config import LARGEST_MOSAIC
from codedinvnet.nn.fusion import (
    GRIDS,
    FusionEncoder,
    LeanFusion,
    MosaicFusion,
    PatchDiscriminator,
    PixelMean,
    UNetFusion,
    mosaic_grid,
)

CHANNELS = 2
SIDE = {"lean": 0, "lean-side": 3, "unet": 0, "unet-5": 0, "mean": 0}
SIZE = {"unet-5": 32}


@torch.no_grad()
def encoder(name: str) -> FusionEncoder:
    """Build an encoder that does something: the zero initialisation and fresh statistics go."""
    made: FusionEncoder
    if name.startswith("lean"):
        made = LeanFusion(CHANNELS, width=4, side_features=SIDE[name])
    elif name.startswith("mosaic"):
        more, cell_width = "more" in name, 3 if "own" in name else 0
        made = MosaicFusion(
            CHANNELS,
            width=4,
            side_features=3,
            depth=1,
            more_for_few=more,
            cell_width=cell_width,
            few_width=5 if "wide" in name else 0,
        )
    elif name.startswith("unet"):
        made = UNetFusion(CHANNELS, filters=3, depth=5 if name == "unet-5" else 3)
    else:
        made = PixelMean()
    generator = torch.Generator().manual_seed(0)
    for tensor in made.parameters():
        tensor.copy_(0.3 * torch.randn(tensor.shape, generator=generator))
    for part in made.modules():
        if isinstance(part, nn.BatchNorm2d):
            assert part.running_mean is not None
            assert part.running_var is not None
            part.running_mean.normal_(generator=generator)
            part.running_var.uniform_(0.5, 2.0, generator=generator)
    return made.double().eval().requires_grad_(False)


def groups(name: str, members: int, batch: int = 2) -> Tensor:
    size = SIZE.get(name, 8)
    return torch.rand(
        batch,
        members,
        CHANNELS,
        size,
        size,
        dtype=torch.float64,
        generator=torch.Generator().manual_seed(members),
    )


EVERY = pytest.mark.parametrize("name", list(SIDE))


@EVERY
def test_parity_does_not_depend_on_the_order(name: str) -> None:
    network = encoder(name)
    x = groups(name, 5)
    order = torch.tensor([3, 0, 4, 1, 2])
    before, after = network(x), network(x[:, order])
    torch.testing.assert_close(after.parity, before.parity)
    torch.testing.assert_close(after.side, before.side[:, order])


@EVERY
@pytest.mark.parametrize("members", [3, 10])
def test_a_group_of_one_image_is_that_image_alone(name: str, members: int) -> None:
    network, x = encoder(name), groups(name, 2)[:, :1]
    assert network.side_features == SIDE[name]
    alone, together = network(x), network(x.expand(-1, members, -1, -1, -1))
    assert together.parity.shape == (2, *x.shape[2:])
    assert together.side.shape == (2, members, SIDE[name])
    torch.testing.assert_close(together.parity, alone.parity)
    torch.testing.assert_close(together.side, alone.side.expand(-1, members, -1))


@EVERY
def test_groups_of_a_batch_do_not_mix(name: str) -> None:
    network, x = encoder(name), groups(name, 3, batch=4)
    together = network(x)
    for row in range(4):
        alone = network(x[row : row + 1])
        torch.testing.assert_close(together.parity[row : row + 1], alone.parity)
        torch.testing.assert_close(together.side[row : row + 1], alone.side)


def test_a_fresh_lean_encoder_starts_at_the_average_image() -> None:
    x = torch.rand(2, 3, 1, 16, 8)
    torch.testing.assert_close(LeanFusion(1, width=4)(x).parity, x.mean(1))


@pytest.mark.parametrize("members", [2, 5])
def test_discriminator_scores_patches_of_group_and_parity(members: int) -> None:
    torch.manual_seed(0)
    discriminator = PatchDiscriminator(1, members, filters=4, layers=3).eval()
    x, parity = torch.rand(2, members, 1, 32, 32), torch.rand(2, 1, 32, 32)
    score = discriminator(x, parity)
    assert score.shape == (2, 1, 2, 2)
    assert PatchDiscriminator(1, members, filters=4, layers=2)(x, parity).shape == (2, 1, 6, 6)
    assert not torch.equal(discriminator(x, parity.flip(0)), score)
    assert not torch.equal(discriminator(x.flip(1), parity), score)


def mosaic_groups(members: int) -> Tensor:
    generator = torch.Generator().manual_seed(members)
    return torch.rand(2, members, CHANNELS, 16, 16, dtype=torch.float64, generator=generator)


def cells(parity: Tensor, members: int) -> list[Tensor]:
    """Cut a mosaic (B, C, H, W) into its cells, row by row."""
    rows, columns = mosaic_grid(members)
    return [cell for row in parity.chunk(rows, 2) for cell in row.chunk(columns, 3)]


@pytest.mark.parametrize("name", ["mosaic", "mosaic-more", "mosaic-own", "mosaic-own-more"])
@pytest.mark.parametrize("members", range(1, LARGEST_MOSAIC + 1))
def test_a_mosaic_has_one_cell_a_member_and_no_member_in_anothers(name: str, members: int) -> None:
    network, x = encoder(name), mosaic_groups(members)
    parity, side = network(x)
    assert parity.shape == (2, CHANNELS, 16, 16)
    assert side.shape == (2, members, 3)
    assert network.keeps_apart
    before = cells(parity, members)
    assert len(before) in {rows * columns for rows, columns in GRIDS}
    assert len(before) // 2 < members or len(before) == 2
    for empty in before[members:]:
        assert not empty.any()
    for member in range(members):
        changed = x.clone()
        changed[:, member] = changed[:, member].flip(-1)
        after = network(changed)
        for place, (old, new) in enumerate(zip(before, cells(after.parity, members), strict=True)):
            assert torch.allclose(old, new) is (place != member)
        moved = (after.side - side).abs().amax((0, 2)) > 1e-6
        assert moved.tolist() == [place == member for place in range(members)]
