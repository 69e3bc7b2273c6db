"""The iterations that invert a residual block."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from codedinvnet.nn.iresnet import IResNetBlock
from codedinvnet.nn.transform import NotConverged
from tests.nn.transforms import block, iresnet, noise


@pytest.mark.parametrize("tolerance", [1e-2, 1e-4, 1e-6])
def test_error_of_an_inverse_is_bounded_by_its_tolerance(tolerance: float) -> None:
    transform = block()
    x = 3 * noise(4, 2, 3, 4)
    back = transform.inverse(transform(x), tolerance=tolerance)
    error = (back - x).flatten(1).norm(dim=1)
    lipschitz = 0.9**3
    assert float(error.max()) <= math.sqrt(24) * tolerance * lipschitz / (1 - lipschitz)
    assert float(error.max()) > 0


def easy_and_hard() -> tuple[IResNetBlock, Tensor]:
    """Return a block and latents of which the middle one needs two iterations.

    Its x and z are so far below 0 that the leading ReLU makes the branch constant there.
    """
    transform = block()
    x = noise(3, 2, 3, 4, seed=5).abs()
    x[1] = -50.0
    return transform, transform(x)


def test_too_few_iterations_raise() -> None:
    transform, z = easy_and_hard()
    with pytest.raises(NotConverged, match=r"2 sample\(s\).* after 2 iterations") as caught:
        transform.inverse(z, tolerance=1e-10, max_iterations=2)
    x = z
    for _ in range(2):
        before, x = x, z - transform.branch(x)
    assert caught.value.residual == pytest.approx(float((x - before).abs().max()))
    assert caught.value.samples == 2
    assert caught.value.iterations == 2


def test_a_sample_with_nan_never_counts_as_converged() -> None:
    transform, z = easy_and_hard()
    z[2, 1, 0, 3] = torch.nan
    with pytest.raises(NotConverged) as caught:
        transform.inverse(z, max_iterations=100)
    assert math.isnan(caught.value.residual)
    assert caught.value.samples == 1
    assert caught.value.iterations == 100


def test_a_network_passes_the_limits_of_an_inverse_on() -> None:
    network = iresnet()
    z = network(noise(2, 1, 4, 4))
    with pytest.raises(NotConverged) as caught:
        network.inverse(z, tolerance=1e-10, max_iterations=2)
    assert caught.value.iterations == 2
    with pytest.raises(NotConverged):
        network.inverse(torch.full_like(z, torch.nan))
    coarse, fine = (network.inverse(z, tolerance=t) for t in (1e-2, 1e-12))
    assert 1e-8 < float((coarse - fine).abs().max()) < 0.1
