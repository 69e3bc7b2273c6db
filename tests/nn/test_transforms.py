"""What every transform keeps: its inverse, its log-determinant, its shapes."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.autograd.functional import jacobian

from codedinvnet.nn.iresnet import IResNetBlock
from codedinvnet.nn.layers import ActNorm, InjectivePad, Squeeze
from codedinvnet.nn.transform import TransformSequence
from tests.nn.transforms import (
    BLOCKS,
    INTO,
    NETWORKS,
    ONTO,
    Case,
    block,
    each,
    noise,
)


@each(ONTO | INTO)
def test_inverse_undoes_forward_and_shape_is_as_announced(case: Case) -> None:
    transform = case.build()
    assert transform.output_shape(case.input_shape) == case.output_shape

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


@each(ONTO)
def test_log_determinant_is_that_of_the_jacobian(case: Case) -> None:
    transform = case.build()
    for part in transform.modules():
        if isinstance(part, IResNetBlock):
            part.series_terms, part.trace_samples = 60, 0
    x = noise(2, *case.input_shape, seed=4)
    size = math.prod(case.input_shape)
    expected = []
    for sample in x:
        matrix = jacobian(lambda v: transform(v[None])[0], sample)
        expected.append(torch.linalg.slogdet(matrix.reshape(size, size)).logabsdet)
    found = transform.log_abs_det(x)
    assert not found.requires_grad
    torch.testing.assert_close(found, torch.stack(expected), rtol=0.0, atol=1e-7)


@pytest.mark.parametrize("probes", [1, 4])
def test_trace_estimate_is_unbiased_and_more_probes_make_it_steadier(probes: int) -> None:
    transform = block("elu")
    x = noise(1, 2, 3, 4)
    transform.series_terms, transform.trace_samples = 4, 0
    exact = transform.log_abs_det(x)
    torch.manual_seed(0)
    count = 8_000
    transform.trace_samples = probes
    estimates = transform.log_abs_det(x.expand(count, -1, -1, -1))
    transform.trace_samples = 1
    single = transform.log_abs_det(x.expand(count, -1, -1, -1))
    standard_error = float(estimates.std()) / math.sqrt(count)
    assert standard_error < 0.05 * abs(float(exact))
    assert abs(float(estimates.mean() - exact)) < 4 * standard_error
    assert float(estimates.std() / single.std()) == pytest.approx(probes**-0.5, rel=0.1)


def test_log_determinant_has_the_right_gradient() -> None:
    transform = block("softplus")
    transform.series_terms, transform.trace_samples = 3, 0
    x = noise(1, 2, 3, 4).requires_grad_()
    assert torch.autograd.gradcheck(transform.log_abs_det, (x,))
    transform.requires_grad_(True)
    (slope,) = torch.autograd.grad(transform.log_abs_det(x).sum(), transform.conv1.weight)
    step = torch.zeros_like(slope)
    step[0, 0, 0, 0] = 1e-5
    with torch.no_grad():
        values = []
        for sign in (1, -1):
            transform.conv1.weight.add_(sign * step)
            values.append(float(transform.log_abs_det(x)))
            transform.conv1.weight.sub_(sign * step)
    assert (values[0] - values[1]) / 2e-5 == pytest.approx(float(slope[0, 0, 0, 0]), abs=1e-7)


@each(BLOCKS | NETWORKS)
def test_inverse_builds_no_autograd_graph(case: Case) -> None:
    transform = case.build().requires_grad_(True)
    z = noise(2, *case.output_shape).requires_grad_()
    back = transform.inverse(z)
    assert not back.requires_grad
    assert transform(z.new_ones(1, *case.input_shape)).requires_grad


def test_a_sequence_runs_forward_in_order_and_backward_in_reverse() -> None:
    double, shift = ActNorm(1).double(), ActNorm(1).double()
    with torch.no_grad():
        double.log_scale.fill_(math.log(2.0))
        shift.shift.fill_(3.0)
    sequence = TransformSequence([double, shift, Squeeze(2)])
    assert sequence.steps()[:2] == [double, shift]
    x = noise(2, 1, 2, 4)
    expected = torch.nn.functional.pixel_unshuffle(2 * x + 3, 2)
    torch.testing.assert_close(sequence(x), expected)
    torch.testing.assert_close(sequence.inverse(expected), x)
    assert sequence.output_shape((1, 2, 4)) == (4, 1, 2)
    torch.testing.assert_close(
        sequence.log_abs_det(x), x.new_full((2,), 8 * math.log(2.0)), check_dtype=False
    )


def test_squeeze_makes_channels_of_each_block_of_pixels() -> None:
    z = Squeeze(2)(torch.arange(16.0).view(1, 1, 4, 4))
    assert z[0, :, 0, 1].tolist() == [2.0, 3.0, 6.0, 7.0]
    assert z[0, :, 1, 0].tolist() == [8.0, 9.0, 12.0, 13.0]


def test_padding_appends_zeros_and_its_inverse_drops_whatever_is_there() -> None:
    x = noise(2, 2, 3, 3)
    z = InjectivePad(3)(x)
    assert torch.equal(z[:, :2], x)
    assert not z[:, 2:].any()
    z[:, 2:] = 7.0
    assert torch.equal(InjectivePad(3).inverse(z), x)


def test_actnorm_normalises_its_first_batch_and_spares_constant_channels() -> None:
    x = noise(50, 3, 4, 4) * torch.tensor([0.5, 4.0, 0.0]).view(3, 1, 1) + 2.0
    layer = ActNorm(3).double()
    layer.initialise(x)
    channels = layer(x).transpose(0, 1).flatten(1)
    torch.testing.assert_close(channels.mean(1), torch.zeros(3, dtype=torch.float64))
    assert channels.std(1).tolist() == pytest.approx([1.0, 1.0, 0.0])
    assert layer.log_scale[2].item() == pytest.approx(math.log(20.0))
