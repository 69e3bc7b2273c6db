"""i-ResNet: residual blocks that are invertible because their branch contracts.

Behrmann et al., *Invertible Residual Networks*, ICML 2019.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from codedinvnet.nn.layers import ActNorm, Squeeze, StagedNetwork
from codedinvnet.nn.lipschitz import LipschitzConv2d, operator_norm
from codedinvnet.nn.resnet import PlainNetwork
from codedinvnet.nn.transform import InvertibleTransform, NotConverged, TransformSequence

FINE = 1e-5
"""Tolerances below it are so near to the rounding of float32 latents that these are widened."""
SECANT_STEPS = 50
"""From this iteration on an inverse takes plain steps; the shipped networks need 10 to 20."""
LARGEST_SHARE = 4.0
"""How far a secant step may reach, in last changes; the shipped networks' reach at most 0.5."""
CACHED_BYTES = 2**20
"""How large a branch's inner activations may get on a CPU: they are to stay in its second cache."""


def convolve(conv: nn.Conv2d, x: Tensor) -> Tensor:
    """Apply a stride-1 convolution as such: for single images its module's call costs a tenth."""
    return F.conv2d(x, conv.weight, conv.bias, padding=conv.padding)


def secant_step(mapped: Tensor, step: Tensor, mapped_before: Tensor, step_before: Tensor) -> Tensor:
    """Return where the step of a fixed-point iteration would vanish if it changed linearly.

    Args:
        mapped: G(x) of the last iteration, (B, C, H, W).
        step: G(x) - x of the last iteration.
        mapped_before: G(x) of the one before.
        step_before: G(x) - x of the one before.
    """
    change = step - step_before
    share = (step * change).sum((1, 2, 3)) / change.square().sum((1, 2, 3))
    share = share.nan_to_num_(0.0).clamp_(-LARGEST_SHARE, LARGEST_SHARE)
    return (mapped_before - mapped).mul_(share[:, None, None, None]).add_(mapped)


class IResNetBlock(InvertibleTransform):
    """y = x + F(x) with a bottleneck branch F: 3×3, 1×1, 3×3 convolutions, each of norm < 1.

    Args:
        channels: channels of input and output.
        hidden: channels between the convolutions.
        size: (H, W) of the input.
        coefficient: bound on each convolution; the branch's Lipschitz constant is at most its cube.
        first: leave out the leading nonlinearity (the network's first block sees pixels).
    """

    def __init__(
        self,
        channels: int,
        hidden: int,
        size: tuple[int, int],
        *,
        coefficient: float,
        first: bool = False,
    ) -> None:
        super().__init__()
        self.first = first
        self.size = size

        def conv(a: int, b: int, kernel: int) -> nn.Conv2d:
            return LipschitzConv2d(a, b, kernel, input_size=size, coefficient=coefficient)

        self.conv1 = conv(channels, hidden, 3)
        self.conv2 = conv(hidden, hidden, 1)
        self.conv3 = conv(hidden, channels, 3)
        self.rows = max(1, CACHED_BYTES // (4 * hidden * size[0] * size[1]))
        self.iterations = 0
        """Iterations that the last inverse spent on its slowest sample."""

    def branch(self, x: Tensor) -> Tensor:
        """Return F(x), (B, C, H, W)."""
        if len(x) > self.rows and x.device.type == "cpu" and not torch.is_grad_enabled():
            return torch.cat([self._branch(part) for part in x.chunk(-(-len(x) // self.rows))])
        return self._branch(x)

    def _branch(self, x: Tensor) -> Tensor:
        h = convolve(self.conv1, x if self.first else F.elu(x))
        h = convolve(self.conv2, F.elu_(h))
        return convolve(self.conv3, F.elu_(h))

    def forward(self, x: Tensor) -> Tensor:
        return self.branch(x).add_(x)

    def inverse(self, z: Tensor, *, tolerance: float = 1e-5, max_iterations: int = 200) -> Tensor:
        """Solve x + F(x) = z by fixed-point iteration (paper, algorithm 1), with secant steps.

        The residual |x + F(x) - z| is checked per sample in every iteration; samples below the
        tolerance stop. Its value bounds the error of x, of n elements, in the 2-norm by
        sqrt(n) * residual / (1 - Lip F).

        The first iterations end in a secant step, Anderson acceleration of depth 1 (Walker & Ni,
        *Anderson acceleration for fixed-point iterations*, SIAM J. Numer. Anal. 2011), for each
        sample on its own. Those from `SECANT_STEPS` on are plain, and converge as F contracts.

        If z is of a finer type than the weights, so is the branch in the second half of the
        iterations: a sample that is still open then is held up by the branch's rounding.
        """
        evaluated = self
        with torch.no_grad():
            if not self.conv1.weight.is_contiguous():  # one layout for all that is added
                z = z.contiguous(memory_format=torch.channels_last)
            solution = torch.empty_like(z)
            if z.shape[0] == 0:
                self.iterations = 0
                return solution
            open_rows = torch.arange(z.shape[0], device=z.device)
            x, target, residual = z, z, z.new_zeros(0)
            before: tuple[Tensor, Tensor] | None = None
            for self.iterations in range(1, max_iterations + 1):
                if self.iterations == max_iterations // 2 and x.dtype != self.conv1.weight.dtype:
                    evaluated = copy.deepcopy(self).to(x.dtype)
                mapped = target - evaluated.branch(x.to(evaluated.conv1.weight.dtype))
                step = mapped - x
                residual = step.abs().amax((1, 2, 3))
                is_open = ~(residual <= tolerance)  # not `>`: NaN must stay open
                x = mapped
                if before is not None and self.iterations < SECANT_STEPS:
                    x = secant_step(mapped, step, *before)
                before = mapped, step
                if not bool(is_open.all()):
                    solution[open_rows[~is_open]] = mapped[~is_open]
                    open_rows, x, target = open_rows[is_open], x[is_open], target[is_open]
                    residual, before = residual[is_open], (mapped[is_open], step[is_open])
                    if open_rows.numel() == 0:
                        return solution
            raise NotConverged(float(residual.max()), open_rows.numel(), max_iterations)


class IResNet(StagedNetwork):
    """The network: a squeeze, then stages of [ActNorm, block], each but the first after a squeeze.

    Args:
        input_shape: (C, H, W).
        blocks: blocks per stage.
        strides: 1, or 2 for a squeeze in front of the stage.
        hidden: branch channels per stage.
        coefficient: bound on every convolution's norm.
        initial_squeeze: factor of the first squeeze (1: none).

    Raises:
        ValueError: if a squeeze cannot divide the image.
    """

    def __init__(
        self,
        input_shape: tuple[int, int, int],
        *,
        blocks: Sequence[int] = (7, 7, 7),
        strides: Sequence[int] = (1, 2, 2),
        hidden: Sequence[int] = (32, 64, 128),
        coefficient: float = 0.9,
        initial_squeeze: int = 2,
    ) -> None:
        def block(
            shape: tuple[int, int, int], width: int, first: bool
        ) -> list[InvertibleTransform]:
            made = IResNetBlock(shape[0], width, shape[1:], coefficient=coefficient, first=first)
            return [ActNorm(shape[0]), made]

        super().__init__(
            input_shape,
            block,
            blocks=blocks,
            strides=strides,
            hidden=hidden,
            initial_squeeze=initial_squeeze,
        )
        self.coefficient = coefficient

    def inverse(self, z: Tensor, *, tolerance: float = 1e-5, max_iterations: int = 200) -> Tensor:
        """Invert the blocks one after another.

        Branches are evaluated in the weights' precision, unless it turns out to be too coarse. With
        a fine tolerance, what they are subtracted from is kept in float64: latents grow far larger
        than what one branch adds, and rounding them in every iteration and block would cost more
        than the branches' own rounding.
        """
        wide = z.double() if tolerance < FINE else z
        wide = super().inverse(wide, tolerance=tolerance, max_iterations=max_iterations)
        return wide.to(z.dtype)

    def largest_singular_value(self) -> float:
        """Return the largest converged singular value of all convolutions, folded or not."""
        return max(
            operator_norm(conv, block.size if conv.kernel_size[0] > 1 else (1, 1))
            for block in self.modules()
            if isinstance(block, IResNetBlock)
            for conv in (block.conv1, block.conv2, block.conv3)
        )


def steps(network: nn.Module) -> list[nn.Module]:
    """Return the layers of a network in forward order; of one that doesn't tell them, itself."""
    return network.steps() if isinstance(network, (TransformSequence, PlainNetwork)) else [network]


@torch.no_grad()
def initialise_actnorm(network: nn.Module, x: Tensor) -> None:
    """Set every ActNorm of a network from one batch x (B, C, H, W), front to back."""
    for step in steps(network):
        if isinstance(step, ActNorm):
            step.initialise(x)
        x = step(x)


def mixup_points(network: nn.Module) -> list[int]:
    """Return where manifold mixup may mix, as positions between layers.

    Before the first, before each that is no squeeze or activation normalisation, after the last.
    """
    names, layers = (ActNorm, Squeeze), steps(network)
    points = [i for i, layer in enumerate(layers) if not isinstance(layer, names)]
    return [0, *[p for p in points if p > 0], len(layers)]
