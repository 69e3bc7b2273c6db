from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from codedinvnet.nn.fusion import (
    FusionEncoder,
    LeanFusion,
    PatchDiscriminator,
    PixelMean,
    UNetFusion,
)

CHANNELS = 2
NAMES = ("lean", "lean-deep", "unet", "unet-5", "mean")
SIZE = {"unet-5": 32}


@torch.no_grad()
def encoder(name: str) -> FusionEncoder:
    """Build an encoder that does something: the zero initialisation and fresh statistics go."""
    made: FusionEncoder
    if name.startswith("lean"):
        made = LeanFusion(CHANNELS, width=4, depth=int(name == "lean-deep"))
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


EVERY = pytest.mark.parametrize("name", NAMES)


@EVERY
def test_parity_does_not_depend_on_the_order(name: str) -> None:
    network = encoder(name)
    x = groups(name, 5)
    order = torch.tensor([3, 0, 4, 1, 2])
    torch.testing.assert_close(network(x[:, order]), network(x))


@EVERY
@pytest.mark.parametrize("members", [3, 10])
def test_a_group_of_one_image_is_that_image_alone(name: str, members: int) -> None:
    network, x = encoder(name), groups(name, 2)[:, :1]
    together = network(x.expand(-1, members, -1, -1, -1))
    assert together.shape == (2, *x.shape[2:])
    torch.testing.assert_close(together, network(x))


@EVERY
def test_groups_of_a_batch_do_not_mix(name: str) -> None:
    network, x = encoder(name), groups(name, 3, batch=4)
    together = network(x)
    for row in range(4):
        torch.testing.assert_close(together[row : row + 1], network(x[row : row + 1]))


def test_a_fresh_lean_encoder_starts_at_the_average_image() -> None:
    x = torch.rand(2, 3, 1, 16, 8)
    torch.testing.assert_close(LeanFusion(1, width=4)(x), x.mean(1))


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
