"""i-RevNet: coupling blocks with an inverse in closed form.

Jacobsen, Smeulders & Oyallon, *i-RevNet: Deep Invertible Networks*, ICLR 2018.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from codedinvnet.nn.layers import StagedNetwork
from codedinvnet.nn.transform import InvertibleTransform


class CouplingBlock(InvertibleTransform):
    """(a, b) -> (b, a + F(b)) on the two halves of the channels (paper, section 3.1).

    F is a pre-activated bottleneck of three convolutions with batch normalisation; the block is
    volume preserving. Its inverse is exact in evaluation mode, where the normalisation is fixed.

    Args:
        channels: channels of input and output, even.
        hidden: channels inside F.
        first: leave out the leading normalisation and nonlinearity.
    """

    def __init__(self, channels: int, hidden: int, *, first: bool = False) -> None:
        super().__init__()
        half = channels // 2
        lead: list[nn.Module] = [] if first else [nn.BatchNorm2d(half), nn.ReLU()]
        self.branch = nn.Sequential(
            *lead,
            nn.Conv2d(half, hidden, 3, padding=1, bias=False),
            nn.BatchNorm2d(hidden),
            nn.ReLU(),
            nn.Conv2d(hidden, hidden, 3, padding=1, bias=False),
            nn.BatchNorm2d(hidden),
            nn.ReLU(),
            nn.Conv2d(hidden, half, 3, padding=1, bias=False),
        ).to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def forward(self, x: Tensor) -> Tensor:
        a, b = x.chunk(2, dim=1)
        return torch.cat([b, a + self.branch(b)], dim=1)

    def inverse(self, z: Tensor, *, tolerance: float = 1e-5, max_iterations: int = 200) -> Tensor:
        b, c = z.chunk(2, dim=1)
        return torch.cat([c - self.branch(b), b], dim=1)


class IRevNet(StagedNetwork):
    """A squeeze, then stages of coupling blocks; the arguments are those of `StagedNetwork`.

    Raises:
        ValueError: if a squeeze cannot divide the image, or channels cannot be halved.
    """

    def __init__(
        self,
        input_shape: tuple[int, int, int],
        *,
        blocks: Sequence[int],
        strides: Sequence[int],
        hidden: Sequence[int],
        initial_squeeze: int = 2,
    ) -> None:
        def block(shape: tuple[int, int, int], width: int, first: bool) -> list[CouplingBlock]:
            if shape[0] % 2:
                raise ValueError(
                    f"a coupling block cannot halve {shape[0]} channels: change the squeezes"
                )
            return [CouplingBlock(shape[0], width, first=first)]

        super().__init__(
            input_shape,
            block,
            blocks=blocks,
            strides=strides,
            hidden=hidden,
            initial_squeeze=initial_squeeze,
        )
