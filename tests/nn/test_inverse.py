"""The iterations that invert a residual block."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import Tensor

from codedinvnet.nn.iresnet import IResNetBlock, secant_step
from codedinvnet.nn.transform import NotConverged
from tests.nn.transforms import (
    block,
    iresnet,
    noise,
)


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


def test_samples_that_converge_early_stop(monkeypatch: pytest.MonkeyPatch) -> None:
    transform, z = easy_and_hard()
    alone, spent = [], []
    for row in z.split(1):
        alone.append(transform.inverse(row, tolerance=1e-10))
        spent.append(transform.iterations)
    assert spent[1] == 2
    assert min(spent[0], spent[2]) > 3
    sizes: list[int] = []
    branch = transform.branch

    def counted(x: Tensor) -> Tensor:
        sizes.append(len(x))
        return branch(x)

    monkeypatch.setattr(transform, "branch", counted)
    together = transform.inverse(z, tolerance=1e-10)
    torch.testing.assert_close(together, torch.cat(alone), rtol=0.0, atol=1e-13)
    assert transform.iterations == max(spent)
    assert sizes == [sum(s > i for s in spent) for i in range(max(spent))]


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


def test_a_secant_step_solves_what_is_linear_for_each_sample() -> None:
    slopes = torch.tensor([-0.7, 0.0, 0.6], dtype=torch.float64)[:, None, None, None]
    solution, start = noise(3, 1, 1, 1), noise(3, 1, 1, 1, seed=1)

    def mapped(x: Tensor) -> Tensor:
        return solution + slopes * (x - solution)

    first = mapped(start)
    second = mapped(first)
    found = secant_step(second, second - first, first, first - start)
    torch.testing.assert_close(found, solution, rtol=0.0, atol=1e-12)


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


def test_a_branch_that_is_too_coarse_for_the_tolerance_gets_finer(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    exact = block()
    narrow = copy.deepcopy(exact).float()
    whole, calls = IResNetBlock.branch, 0

    def coarse(self: IResNetBlock, x: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        found = whole(self, x)
        return found + 1e-4 * (-1) ** calls if x.dtype == torch.float32 else found

    monkeypatch.setattr(IResNetBlock, "branch", coarse)
    z = noise(5, 2, 3, 4)
    found = narrow.inverse(z, tolerance=1e-9)
    assert narrow.iterations > 100
    torch.testing.assert_close(found, exact.inverse(z, tolerance=1e-12), rtol=0.0, atol=1e-6)
    with pytest.raises(NotConverged):
        narrow.inverse(z.float(), tolerance=1e-5)
