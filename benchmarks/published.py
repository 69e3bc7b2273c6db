"""The i-ResNet as it was published, for the speed benchmarks to be compared with.

In the code of Behrmann et al. (ICML 2019) every convolution keeps its raw weight, estimates its
norm in each forward pass from two stored vectors (one power iteration step goes before that while
it trains), and divides the weight by what is above the bound. Activation normalisation is a layer
of its own, and the inverse spends a fixed number of fixed-point iterations without looking at the
residual. Two things are kinder to this baseline than that code: a 1×1 convolution's power iteration
runs on its matrix, and nothing is added to the divisor.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from codedinvnet.nn.iresnet import IResNet, IResNetBlock
from codedinvnet.nn.transform import InvertibleTransform

NONLINEARITIES: dict[str, Callable[[Tensor], Tensor]] = {
    "elu": F.elu,
    "relu": F.relu,
    "softplus": F.softplus,
}
START_STEPS = 50
"""Power iteration steps from a random vector before the first forward pass."""


class NormalisedConv2d(nn.Conv2d):
    """A convolution that divides its weight by norm / coefficient, if above 1, in each pass.

    Args:
        conv: the weight and bias to begin with, copied.
        size: (H, W) of the input.
        coefficient: the bound on the norm.
    """

    u: Tensor
    v: Tensor

    def __init__(self, conv: nn.Conv2d, size: tuple[int, int], coefficient: float) -> None:
        kernel = cast(tuple[int, int], conv.kernel_size)
        padding = cast(tuple[int, int], conv.padding)
        super().__init__(conv.in_channels, conv.out_channels, kernel, padding=padding)
        assert self.bias is not None
        assert conv.bias is not None
        with torch.no_grad():
            self.weight.copy_(conv.weight)
            self.bias.copy_(conv.bias)
        self.coefficient = coefficient
        self.pointwise = kernel == (1, 1)
        v = torch.randn(1, conv.in_channels, *size, generator=torch.Generator().manual_seed(0))
        self.register_buffer("v", v[0, :, 0, 0].clone() if self.pointwise else v)
        self.register_buffer("u", torch.zeros(1))
        self.to(conv.weight)
        self.u = self.apply_operator(self.v).detach()
        for _ in range(START_STEPS):
            self.power_step()

    def apply_operator(self, v: Tensor) -> Tensor:
        """Apply the raw weight's linear part to v."""
        if self.pointwise:
            return self.weight.flatten(1) @ v
        return F.conv2d(v, self.weight, padding=self.padding)

    @torch.no_grad()
    def power_step(self) -> None:
        """Bring u and v nearer to the top singular vectors of the raw weight."""
        if self.pointwise:
            v = self.weight.flatten(1).t() @ self.u
        else:
            padding = cast(tuple[int, int], self.padding)
            v = F.conv_transpose2d(self.u, self.weight, padding=padding)
        self.v = v / v.norm().clamp_min(1e-12)
        u = self.apply_operator(self.v)
        self.u = u / u.norm().clamp_min(1e-12)

    def normalised(self) -> Tensor:
        """Return the weight over its norm / coefficient, if that is above 1."""
        norm = torch.dot(self.u.flatten(), self.apply_operator(self.v).flatten())
        return self.weight / (norm / self.coefficient).clamp_min(1.0)

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):  # a norm in bfloat16 bounds nothing
            if self.training:
                self.power_step()
            weight = self.normalised()
        return F.conv2d(x, weight, self.bias, padding=self.padding)

    @torch.no_grad()
    def folded(self) -> nn.Conv2d:
        """Return a plain convolution with the normalised weight."""
        plain = nn.Conv2d(
            self.in_channels,
            self.out_channels,
            cast(tuple[int, int], self.kernel_size),
            padding=cast(tuple[int, int], self.padding),
        ).to(self.weight)
        plain.load_state_dict({"weight": self.normalised(), "bias": self.bias})
        return plain


class PublishedBlock(nn.Module):
    """y = x + F(x), built from a block of ours with equal weights."""

    def __init__(self, block: IResNetBlock, coefficient: float) -> None:
        super().__init__()
        self.first, self.act = block.first, NONLINEARITIES[block.nonlinearity]
        self.conv1: nn.Conv2d = NormalisedConv2d(block.conv1, block.size, coefficient)
        self.conv2: nn.Conv2d = NormalisedConv2d(block.conv2, block.size, coefficient)
        self.conv3: nn.Conv2d = NormalisedConv2d(block.conv3, block.size, coefficient)

    def branch(self, x: Tensor) -> Tensor:
        """Return F(x), (B, C, H, W)."""
        h = self.conv1(x if self.first else self.act(x))
        out: Tensor = self.conv3(self.act(self.conv2(self.act(h))))
        return out

    def forward(self, x: Tensor) -> Tensor:
        """Map x (B, C, H, W) to y of the same shape."""
        return x + self.branch(x)


class PublishedIResNet(nn.Module):
    """The published network with the weights of one of ours, which are copied."""

    def __init__(self, network: IResNet) -> None:
        super().__init__()
        coefficient = network.coefficient
        assert coefficient is not None, "the published network has a bound"
        self.transforms = nn.ModuleList(
            PublishedBlock(step, coefficient)
            if isinstance(step, IResNetBlock)
            else copy.deepcopy(step)
            for step in network.steps()
        )

    def steps(self) -> list[nn.Module]:
        """Return the transforms in forward order."""
        return list(self.transforms)

    def forward(self, x: Tensor) -> Tensor:
        """Map images (B, C, H, W) to latents (B, *latent_shape)."""
        for transform in self.transforms:
            x = transform(x)
        return x

    def folded(self) -> PublishedIResNet:
        """Return a copy with plain convolutions, and otherwise as it is."""
        plain = copy.deepcopy(self)
        for block in plain.transforms:
            if isinstance(block, PublishedBlock):
                for name in ("conv1", "conv2", "conv3"):
                    conv = getattr(block, name)
                    setattr(block, name, conv.folded())
        return plain.requires_grad_(False).eval()


@torch.no_grad()
def unchecked_inverse(network: PublishedIResNet | IResNet, z: Tensor, iterations: int) -> Tensor:
    """Invert a network by so many fixed-point iterations a block, for all samples alike.

    Args:
        network: the published one, or one of ours.
        z: latents (B, *latent_shape).
        iterations: in every block (Behrmann et al., algorithm 1).

    Returns:
        Images (B, C, H, W), however far they are from the solution.
    """
    for transform in reversed(list(network.transforms)):
        if isinstance(transform, (PublishedBlock, IResNetBlock)):
            x = z
            for _ in range(iterations):
                x = z - transform.branch(x)
            z = x
        else:
            z = cast(InvertibleTransform, transform).inverse(z)
    return z
