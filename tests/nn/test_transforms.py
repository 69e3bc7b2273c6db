"""What every transform keeps: its inverse and its shapes."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from codedinvnet.nn.layers import ActNorm, Squeeze
from tests.nn.transforms import BLOCKS, CASES, NETWORKS, Case, each, noise


@each(CASES)
def test_inverse_undoes_forward(case: Case) -> None:
    transform = case.build()

    @settings(max_examples=8, deadline=None)
    @given(
        seed=st.integers(0, 2**31), batch=st.integers(1, 3), scale=st.sampled_from([0.01, 1.0, 9.0])
    )
    def check(seed: int, batch: int, scale: float) -> None:
        x = scale * noise(batch, *case.input_shape, seed=seed)
        z = transform(x)
        assert z.shape == (batch, *case.output_shape)
        back = transform.inverse(z, tolerance=1e-12, max_iterations=500)
        torch.testing.assert_close(back, x, rtol=0.0, atol=1e-9)

    check()


@each(BLOCKS | NETWORKS)
def test_inverse_builds_no_autograd_graph(case: Case) -> None:
    transform = case.build().requires_grad_(True)
    z = noise(2, *case.output_shape).requires_grad_()
    back = transform.inverse(z)
    assert not back.requires_grad
    assert transform(z.new_ones(1, *case.input_shape)).requires_grad


def test_squeeze_makes_channels_of_each_block_of_pixels() -> None:
    z = Squeeze(2)(torch.arange(16.0).view(1, 1, 4, 4))
    assert z[0, :, 0, 1].tolist() == [2.0, 3.0, 6.0, 7.0]
    assert z[0, :, 1, 0].tolist() == [8.0, 9.0, 12.0, 13.0]


def test_actnorm_normalises_its_first_batch_and_spares_constant_channels() -> None:
    x = noise(50, 3, 4, 4) * torch.tensor([0.5, 4.0, 0.0]).view(3, 1, 1) + 2.0
    layer = ActNorm(3).double()
    layer.initialise(x)
    channels = layer(x).transpose(0, 1).flatten(1)
    torch.testing.assert_close(channels.mean(1), torch.zeros(3, dtype=torch.float64))
    assert channels.std(1).tolist() == pytest.approx([1.0, 1.0, 0.0])
    assert layer.log_scale[2].item() == pytest.approx(math.log(20.0))
