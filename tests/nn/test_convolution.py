from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from codedinvnet.nn.convolution import conv2d


@pytest.mark.parametrize("channels", [1, 4, 7, 8, 12, 15, 16, 20])
@pytest.mark.parametrize(("size", "stride"), [((16, 16), (2, 2)), ((15, 9), (3, 2))])
def test_outputs_and_gradients_are_those_of_double_precision(
    channels: int, size: tuple[int, int], stride: tuple[int, int]
) -> None:
    """On some processors PyTorch's own gradients are wrong here, or the process ends."""
    generator = torch.Generator().manual_seed(channels)
    weight = torch.randn(2 * channels, channels, 1, 1, generator=generator)
    images = torch.randn(32, channels, *size, generator=generator)

    def learned(dtype: torch.dtype, layout: torch.memory_format) -> list[Tensor]:
        x, w = (
            a.to(dtype, memory_format=layout).detach().requires_grad_() for a in (images, weight)
        )
        y = (conv2d if dtype == torch.float32 else F.conv2d)(x, w, stride=stride)
        y.square().sum().backward()
        assert x.grad is not None
        assert w.grad is not None
        return [y.detach(), x.grad, w.grad]

    wanted = learned(torch.float64, torch.contiguous_format)
    for layout in (torch.contiguous_format, torch.channels_last):
        for found, exact in zip(learned(torch.float32, layout), wanted, strict=True):
            torch.testing.assert_close(found.double(), exact, rtol=1e-4, atol=1e-3)


def test_gradients_are_right_on_two_threads_of_a_processor_with_avx2() -> None:
    """Others do without their own instructions. On one thread PyTorch's would end the process."""
    code = """
import torch
from codedinvnet.nn.resnet import Shortcut

torch.manual_seed(0)
images, gradients = torch.randn(32, 7, 32, 32), []
shortcut = Shortcut(7, 14, 2)
exact, fast = (torch.float64, torch.contiguous_format), (torch.float32, torch.channels_last)
for dtype, layout in (exact, fast):
    shortcut.zero_grad()
    shortcut.to(dtype, memory_format=layout)
    shortcut(images.to(dtype, memory_format=layout)).square().sum().backward()
    gradients.append(shortcut.weight.grad.double())
torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-2)
"""
    own = {"OMP_NUM_THREADS": "2", "ONEDNN_MAX_CPU_ISA": "AVX2"}
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | own,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
