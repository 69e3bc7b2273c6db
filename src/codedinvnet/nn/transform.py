"""The interface that every invertible layer and network has."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable

import torch
from torch import Tensor, nn


class NotConverged(RuntimeError):
    """An iterative inverse did not reach its tolerance.

    Attributes:
        residual: the largest remaining residual, in units of the layer's output.
        samples: how many samples of the batch were left above the tolerance.
        iterations: the iterations that were spent.
    """

    def __init__(self, residual: float, samples: int, iterations: int) -> None:
        super().__init__(
            f"the inverse of an i-ResNet block did not converge: {samples} sample(s) above the "
            f"tolerance after {iterations} iterations, largest residual {residual:.3g}"
        )
        self.residual = residual
        self.samples = samples
        self.iterations = iterations


class InvertibleTransform(nn.Module, ABC):
    """A map between image-shaped tensors that can be undone.

    `forward` and `inverse` take and return (B, C, H, W), of as many elements.
    """

    @abstractmethod
    def forward(self, x: Tensor) -> Tensor:
        """Map x (B, C, H, W) to the transform's output (B, C', H', W')."""

    @abstractmethod
    def inverse(self, z: Tensor, *, tolerance: float = 1e-5, max_iterations: int = 200) -> Tensor:
        """Return x with forward(x) = z.

        Args:
            z: (B, C', H', W').
            tolerance: largest residual of an iterative layer, per element, in units of its output.
            max_iterations: how many iterations one layer may spend.

        Raises:
            NotConverged: if a sample is still above the tolerance then.
        """


class TransformSequence(InvertibleTransform):
    """Transforms one after another; the inverse runs them backwards."""

    def __init__(self, transforms: Iterable[InvertibleTransform]) -> None:
        super().__init__()
        self.transforms = nn.ModuleList(transforms)

    def steps(self) -> list[nn.Module]:
        """Return the transforms in forward order."""
        return list(self.transforms)

    def forward(self, x: Tensor) -> Tensor:
        for transform in self.transforms:
            x = transform(x)
        return x

    def inverse(self, z: Tensor, *, tolerance: float = 1e-5, max_iterations: int = 200) -> Tensor:
        with torch.no_grad():
            for transform in reversed(self.steps()):
                assert isinstance(transform, InvertibleTransform)
                z = transform.inverse(z, tolerance=tolerance, max_iterations=max_iterations)
        return z
