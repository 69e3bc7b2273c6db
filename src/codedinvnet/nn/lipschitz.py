"""Convolutions whose operator norm stays below a bound.

The bound is on the operator that is really applied: this kernel with this zero padding on this
input size. Training *projects* the kernel after every optimiser step (Gouk et al., *Regularisation
of neural networks by enforcing Lipschitz continuity*, Machine Learning 2021), with one power
iteration that goes on from the last step's vector, so that a forward pass is a plain convolution.
The power iteration approaches the norm from below, and one direction is reduced at a time;
`constrain_exactly` measures the norm on the dense operator at the end and removes what is left.
"""

from __future__ import annotations

from typing import cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.grad import conv2d_weight
from torch.nn.utils.fusion import fuse_conv_bn_eval

DENSE_LIMIT = 1024
"""The largest Gram matrix that is made densely (1024² eigenvalues take about 0.1 s); above it the
largest singular value is found by ARPACK on the operator itself, to a relative 1e-6."""


LAST_PROJECTIONS = 300
"""How many directions the exact constraint may reduce one by one before it scales the kernel."""


class LipschitzConv2d(nn.Conv2d):
    """A stride-1, same-padded convolution with singular values of at most `coefficient`.

    Args:
        in_channels: channels of the input.
        out_channels: channels of the output.
        kernel_size: odd.
        input_size: (H, W) of the input that the bound holds for.
        coefficient: the bound.
    """

    power_vector: Tensor

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        *,
        input_size: tuple[int, int],
        coefficient: float,
    ) -> None:
        super().__init__(in_channels, out_channels, kernel_size, padding=kernel_size // 2)
        # In this layout the processor's kernels reorder neither what goes in nor what comes out.
        weight = self.weight.detach().contiguous(memory_format=torch.channels_last)
        self.weight = nn.Parameter(weight)
        self.input_size = input_size
        self.coefficient = coefficient
        # A 1x1 convolution acts on every pixel alike, so one pixel has its norm.
        self.operator_size = input_size if kernel_size > 1 else (1, 1)
        start = torch.randn(1, in_channels, *self.operator_size)
        self.register_buffer("power_vector", F.normalize(start.flatten(), dim=0).view_as(start))

    def apply_operator(self, v: Tensor) -> Tensor:
        """Apply the linear part to v (B, in, H, W)."""
        return F.conv2d(v, self.weight, padding=self.padding)

    def apply_adjoint(self, u: Tensor) -> Tensor:
        """Apply the transposed linear part to u (B, out, H, W)."""
        return F.conv_transpose2d(u, self.weight, padding=cast(tuple[int, int], self.padding))

    @torch.no_grad()
    def project(self, iterations: int = 1) -> Tensor:
        """Take the excess out of the kernel if its norm, by power iteration, is above the bound.

        Only the top singular direction is reduced: the kernel moves along the norm's gradient, just
        so far that the norm meets the bound to first order. Scaling the whole kernel instead, step
        after step, would wear down all its other directions.

        Returns:
            The norm that was found, a scalar.
        """
        v = self.power_vector
        for _ in range(iterations):
            v = self.apply_adjoint(self.apply_operator(v))
            v = v / v.norm().clamp_min(1e-12)
        self.power_vector.copy_(v)
        image = self.apply_operator(v)
        norm: Tensor = image.norm()
        excess = (norm - self.coefficient).clamp_min(0.0)
        padding = cast(tuple[int, int], self.padding)
        gradient = conv2d_weight(
            v, self.weight.shape, image / norm.clamp_min(1e-12), padding=padding
        )
        self.weight.sub_(gradient * (excess / gradient.square().sum().clamp_min(1e-12)))
        return norm

    @torch.no_grad()
    def constrain_exactly(self) -> None:
        """Make the converged norm at most the bound, by projections and a last small scaling."""
        for _ in range(LAST_PROJECTIONS):
            if float(self.project(iterations=20)) <= 1.002 * self.coefficient:
                break
        norm = operator_norm(self, self.operator_size)
        if norm > self.coefficient:
            self.weight.mul_(self.coefficient / norm)


@torch.no_grad()
def operator_norm(conv: nn.Conv2d, input_size: tuple[int, int]) -> float:
    """Return the largest singular value of a stride-1 convolution on inputs of `input_size`.

    The smaller Gram matrix is built by pushing the identity through the convolution and its
    transpose, in float64, and its eigenvalues are taken.
    """
    weight = conv.weight.detach().to("cpu", torch.float64)
    padding = cast(tuple[int, int], conv.padding)
    height, width = input_size
    shape_in = (conv.in_channels, height, width)
    shape_out = (
        conv.out_channels,
        height + 2 * padding[0] - conv.kernel_size[0] + 1,
        width + 2 * padding[1] - conv.kernel_size[1] + 1,
    )

    def forward(v: Tensor) -> Tensor:
        return F.conv2d(v, weight, padding=padding)

    def adjoint(u: Tensor) -> Tensor:
        return F.conv_transpose2d(u, weight, padding=padding)

    wide = int(np.prod(shape_in)) > int(np.prod(shape_out))
    shape = shape_out if wide else shape_in
    first, second = (adjoint, forward) if wide else (forward, adjoint)
    size = int(np.prod(shape))
    if size <= DENSE_LIMIT:
        columns = torch.eye(size, dtype=torch.float64).view(size, *shape).split(256)
        gram = torch.cat([second(first(c)).flatten(1) for c in columns])
        return float(torch.linalg.eigvalsh(gram)[-1].clamp_min(0.0).sqrt())

    import scipy.sparse.linalg as sparse  # who serves does not need it

    def matvec(v: np.ndarray) -> np.ndarray:
        return second(first(torch.from_numpy(v).view(1, *shape))).flatten().numpy()

    operator = sparse.LinearOperator((size, size), matvec=matvec, dtype=np.float64)
    start = np.ones(size) + 0.01 * np.random.default_rng(0).standard_normal(size)
    top = sparse.eigsh(operator, k=1, which="LA", tol=1e-6, v0=start, return_eigenvectors=False)
    return float(np.sqrt(max(top[0], 0.0)))


def constrained_layers(module: nn.Module) -> list[LipschitzConv2d]:
    """Return every constrained convolution inside a module."""
    return [m for m in module.modules() if isinstance(m, LipschitzConv2d)]


def project(module: nn.Module, iterations: int = 1) -> None:
    """Project every constrained convolution; call it after each optimiser step."""
    for layer in constrained_layers(module):
        layer.project(iterations)


def constrain_exactly(module: nn.Module) -> None:
    """Make every constrained convolution obey its bound exactly; call it once after training."""
    for layer in constrained_layers(module):
        layer.constrain_exactly()


def fold(module: nn.Module) -> None:
    """Replace every constrained convolution by a plain one with the same kernel, in place.

    A batch normalisation right behind a convolution in a sequence goes into its kernel, too; one
    before a convolution, or behind a transposed one, stays. What is left is what is served, without
    a projection. Outputs in evaluation mode do not change.
    """
    for parent in reversed(list(module.modules())):  # the inner ones first: sequences are copied
        for name, child in list(parent.named_children()):
            if isinstance(child, nn.Sequential):
                setattr(parent, name, _without_normalisation(child))
            elif isinstance(child, LipschitzConv2d):
                plain = nn.Conv2d(
                    child.in_channels,
                    child.out_channels,
                    cast(tuple[int, int], child.kernel_size),
                    padding=cast(tuple[int, int], child.padding),
                )
                plain.weight = child.weight
                plain.bias = child.bias
                setattr(parent, name, plain)


def _without_normalisation(sequence: nn.Sequential) -> nn.Sequential:
    """Return the sequence with each normalisation behind a convolution in the convolution."""
    layers: list[nn.Module] = []
    for layer in sequence:
        before = layers[-1] if layers else None
        if isinstance(layer, nn.BatchNorm2d) and isinstance(before, nn.Conv2d):
            layers[-1] = fuse_conv_bn_eval(before.eval(), layer.eval())
        else:
            layers.append(layer)
    return nn.Sequential(*layers)
