from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.autograd.functional import jacobian

from codedinvnet.nn import iresnet as iresnet_module
from codedinvnet.nn.activation import NONLINEARITIES
from codedinvnet.nn.iresnet import IResNet, IResNetBlock, initialise_actnorm, secant_step
from codedinvnet.nn.irevnet import CouplingBlock, IRevNet
from codedinvnet.nn.layers import ActNorm, InjectivePad, Squeeze
from codedinvnet.nn.lipschitz import constrain_exactly, constrained_layers
from codedinvnet.nn.transform import InvertibleTransform, NotConverged, TransformSequence

Shape = tuple[int, int, int]


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def trained(module: InvertibleTransform) -> InvertibleTransform:
    """Give a module what training would: statistics off their start, kernels at their bound."""
    for index, part in enumerate(module.modules()):
        if isinstance(part, ActNorm):
            part.shift.copy_(noise(len(part.shift), seed=index))
            part.log_scale.copy_(0.4 * noise(len(part.log_scale), seed=index + 1))
        if isinstance(part, nn.BatchNorm2d):
            assert part.running_mean is not None
            assert part.running_var is not None
            part.running_mean.copy_(noise(part.num_features, seed=index))
            part.running_var.copy_(noise(part.num_features, seed=index + 1).exp())
            part.weight.copy_(noise(part.num_features, seed=index + 2))
            part.bias.copy_(noise(part.num_features, seed=index + 3))
    for layer in constrained_layers(module):
        layer.weight.mul_(10.0)
    constrain_exactly(module)
    return module.double().eval().requires_grad_(False)


def block(
    nonlinearity: str = "elu", *, first: bool = False, coefficient: float = 0.9
) -> IResNetBlock:
    torch.manual_seed(0)
    made = trained(
        IResNetBlock(
            2, 5, (3, 4), coefficient=coefficient, nonlinearity=nonlinearity, first=first
        ).double()
    )
    assert isinstance(made, IResNetBlock)
    return made


def iresnet(padding: int = 0, squeeze: int = 2) -> InvertibleTransform:
    torch.manual_seed(1)
    return trained(
        IResNet(
            (1, 4, 4),
            blocks=(2, 1),
            strides=(1, 2),
            hidden=(5, 6),
            initial_squeeze=squeeze,
            injective_padding=padding,
        ).double()
    )


def irevnet(padding: int = 0) -> InvertibleTransform:
    torch.manual_seed(2)
    return trained(
        IRevNet(
            (1, 4, 4),
            blocks=(2, 1),
            strides=(1, 2),
            hidden=(3, 5),
            injective_padding=padding,
        ).double()
    )


def coupling(*, first: bool) -> InvertibleTransform:
    torch.manual_seed(3)
    return trained(CouplingBlock(4, 3, first=first).double())


@dataclass(frozen=True)
class Case:
    build: Callable[[], InvertibleTransform]
    input_shape: Shape
    output_shape: Shape


BLOCKS = {
    f"block-{name}-{'first' if first else 'inner'}": Case(
        lambda name=name, first=first: block(name, first=first),  # type: ignore[misc]
        (2, 3, 4),
        (2, 3, 4),
    )
    for name in NONLINEARITIES
    for first in (True, False)
}
ONTO = {
    "squeeze-2": Case(lambda: Squeeze(2), (3, 4, 6), (12, 2, 3)),
    "squeeze-3": Case(lambda: Squeeze(3), (1, 6, 3), (9, 2, 1)),
    "actnorm": Case(lambda: trained(ActNorm(3)), (3, 2, 4), (3, 2, 4)),
    **BLOCKS,
    "coupling-first": Case(lambda: coupling(first=True), (4, 3, 2), (4, 3, 2)),
    "coupling-inner": Case(lambda: coupling(first=False), (4, 3, 2), (4, 3, 2)),
    "iresnet": Case(iresnet, (1, 4, 4), (16, 1, 1)),
    "iresnet-unsqueezed": Case(lambda: iresnet(squeeze=1), (1, 4, 4), (4, 2, 2)),
    "irevnet": Case(irevnet, (1, 4, 4), (16, 1, 1)),
}
INTO = {
    "pad": Case(lambda: InjectivePad(3), (2, 3, 4), (5, 3, 4)),
    "iresnet-padded": Case(lambda: iresnet(2), (1, 4, 4), (24, 1, 1)),
    "irevnet-padded": Case(lambda: irevnet(2), (1, 4, 4), (24, 1, 1)),
}
NETWORKS = {name: case for name, case in (ONTO | INTO).items() if name.startswith("ire")}


def each(cases: dict[str, Case]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("case", cases.values(), ids=cases.keys())


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
def test_forward_undoes_inverse(case: Case) -> None:
    transform = case.build()
    z = noise(2, *case.output_shape)
    x = transform.inverse(z, tolerance=1e-12, max_iterations=500)
    torch.testing.assert_close(transform(x), z, rtol=0.0, atol=1e-9)


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


def test_set_trace_reaches_every_block() -> None:
    network = iresnet()
    assert isinstance(network, IResNet)
    network.set_trace(series_terms=9, trace_samples=0)
    blocks = [part for part in network.modules() if isinstance(part, IResNetBlock)]
    assert [(part.series_terms, part.trace_samples) for part in blocks] == [(9, 0)] * 3


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


@pytest.mark.parametrize("tolerance", [1e-2, 1e-4, 1e-6])
def test_error_of_an_inverse_is_bounded_by_its_tolerance(tolerance: float) -> None:
    transform = block("elu")
    x = 3 * noise(4, 2, 3, 4)
    back = transform.inverse(transform(x), tolerance=tolerance)
    error = (back - x).flatten(1).norm(dim=1)
    lipschitz = 0.9**3
    assert float(error.max()) <= math.sqrt(24) * tolerance * lipschitz / (1 - lipschitz)
    assert float(error.max()) > 0


def test_iterations_are_those_of_the_tolerance() -> None:
    transform = block("elu")
    z = transform(3 * noise(4, 2, 3, 4))
    spent = []
    for tolerance in (1e-2, 1e-5, 1e-10):
        transform.inverse(z, tolerance=tolerance)
        spent.append(transform.iterations)
    assert 1 < spent[0] < spent[1] < spent[2] < 200
    transform.inverse(z, tolerance=1e-5, max_iterations=spent[1])
    with pytest.raises(NotConverged):
        transform.inverse(z, tolerance=1e-5, max_iterations=spent[1] - 1)


def easy_and_hard() -> tuple[IResNetBlock, Tensor]:
    """Return a block and latents of which the middle one needs two iterations.

    Its x and z are so far below 0 that the leading ReLU makes the branch constant there.
    """
    transform = block("relu")
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


def test_a_secant_step_without_a_change_or_too_far_is_held_back() -> None:
    before, step = torch.zeros(2, 1, 1, 1), torch.ones(2, 1, 1, 1)
    mapped = torch.tensor([1.0, 2.0]).view(2, 1, 1, 1)
    step_before = torch.tensor([1.0, 1.001]).view(2, 1, 1, 1)
    found = secant_step(mapped, step, before, step_before).flatten().tolist()
    assert found == [1.0, pytest.approx(2.0 + iresnet_module.LARGEST_SHARE * 2.0)]


def test_secant_steps_spare_iterations(monkeypatch: pytest.MonkeyPatch) -> None:
    transform = block("elu")
    z = transform(3 * noise(4, 2, 3, 4))
    spent = []
    for steps in (0, 50):
        monkeypatch.setattr(iresnet_module, "SECANT_STEPS", steps)
        transform.inverse(z, tolerance=1e-10)
        spent.append(transform.iterations)
    assert spent[1] < 0.9 * spent[0]


def test_misled_secant_steps_are_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    transform = block("elu")
    x = 3 * noise(4, 2, 3, 4)
    misled: list[Tensor] = []

    def mislead(mapped: Tensor, *_: Tensor) -> Tensor:
        misled.append(mapped)
        return -mapped

    monkeypatch.setattr(iresnet_module, "secant_step", mislead)
    torch.testing.assert_close(transform.inverse(transform(x), tolerance=1e-10), x)
    assert len(misled) == iresnet_module.SECANT_STEPS - 2


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


@pytest.mark.parametrize("name", ["block-elu-inner", "iresnet", "irevnet-padded"])
def test_an_empty_batch_stays_empty_there_and_back(name: str) -> None:
    case = (ONTO | INTO)[name]
    transform = case.build()
    z = transform(torch.zeros(0, *case.input_shape, dtype=torch.float64))
    assert z.shape == (0, *case.output_shape)
    assert transform.inverse(z).shape == (0, *case.input_shape)


def test_large_batches_pass_a_branch_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    transform = block("elu")
    assert transform.rows == 2**20 // (4 * 5 * 3 * 4)
    x = noise(7, 2, 3, 4)
    whole, back = transform(x), transform.inverse(transform(x), tolerance=1e-12)
    sizes: list[int] = []
    piece = transform._branch

    def counted(x: Tensor) -> Tensor:
        sizes.append(len(x))
        return piece(x)

    monkeypatch.setattr(transform, "_branch", counted)
    transform.rows = 3
    with torch.no_grad():
        torch.testing.assert_close(transform(x), whole, rtol=0.0, atol=1e-14)
    assert sizes == [3, 3, 1]
    torch.testing.assert_close(
        transform.inverse(whole, tolerance=1e-12), back, rtol=0.0, atol=1e-14
    )
    assert max(sizes) == 3
    transform(x)  # with gradients: the graph would keep all pieces anyway
    assert sizes[-1] == 7


def test_fine_tolerances_are_met_where_latents_are_large() -> None:
    wide = iresnet()
    for step in wide.modules():
        if isinstance(step, ActNorm):
            step.shift.add_(10.0)
    narrow = copy.deepcopy(wide).float()
    assert isinstance(narrow, IResNet)
    z = wide(noise(8, 1, 4, 4)).float()
    found = narrow.inverse(z, tolerance=1e-6)
    assert found.dtype == torch.float32
    exact = wide.inverse(z.double(), tolerance=1e-12).float()
    torch.testing.assert_close(found, exact, rtol=0.0, atol=1e-5)
    with pytest.raises(NotConverged):  # float32 sums cannot tell that they are there
        TransformSequence.inverse(narrow, z, tolerance=1e-6)


def test_a_branch_that_is_too_coarse_for_the_tolerance_gets_finer(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    exact = block("elu")
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


def test_blocks_leave_their_input_alone() -> None:
    transform = block("elu")
    x = noise(3, 2, 3, 4)
    before = x.clone()
    z = transform(x)
    after = z.clone()
    transform.inverse(z)
    assert torch.equal(x, before)
    assert torch.equal(z, after)


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


@pytest.mark.parametrize("shape", [(1, 3, 4), (1, 4, 3), (1, 5, 5)])
def test_squeeze_refuses_what_it_cannot_divide(shape: Shape) -> None:
    with pytest.raises(ValueError, match=f"squeeze by 2 .* {shape[1]}x{shape[2]} pixels"):
        Squeeze(2).output_shape(shape)
    with pytest.raises(ValueError, match="squeeze by 2"):
        IResNet(shape, blocks=(1,), strides=(1,), hidden=(2,))
    with pytest.raises(ValueError, match="squeeze by 2"):
        IRevNet(shape, blocks=(1,), strides=(2,), hidden=(2,), initial_squeeze=1)


def test_coupling_refuses_odd_channels() -> None:
    with pytest.raises(ValueError, match="cannot halve 5 channels"):
        IRevNet((1, 4, 4), blocks=(1,), strides=(1,), hidden=(2,), injective_padding=1)


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


def test_a_network_is_initialised_front_to_back() -> None:
    network = iresnet()
    assert isinstance(network, IResNet)
    x = 5 * noise(200, 1, 4, 4) + 1
    initialise_actnorm(network, x)
    seen = 0
    for step in network.steps():
        x = step(x)
        if isinstance(step, ActNorm):
            channels = x.transpose(0, 1).flatten(1)
            assert float(channels.mean(1).abs().max()) < 1e-6
            assert float((channels.std(1) - 1).abs().max()) < 1e-6
            seen += 1
    assert seen == 3
