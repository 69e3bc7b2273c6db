from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from codedinvnet.codes.base import Scheme
from codedinvnet.codes.invnet import AverageImage, CodedInvNet, own_code
from codedinvnet.codes.mean import Evidence, LatentCode
from codedinvnet.common.errors import UserError
from codedinvnet.models.coded import CodedModel
from tests.codes.linear import around, outputs_of, tiny_model, without

K = 4
SIZES = range(1, K + 1)
LATENT = 16 * 2 * 2
VARIANTS = {"recovery-head": (4, 16), "side-only": (4, 0), "head-only": (0, 16), "plain": (0, 0)}


def resting_on(evidence: Evidence, model: CodedModel) -> Scheme:
    return replace(around(CodedInvNet, model, K), code=own_code(model, K, evidence))


@pytest.fixture(params=VARIANTS.values(), ids=list(VARIANTS))
def method(request: pytest.FixtureRequest) -> Scheme:
    side_features, head_hidden = request.param
    model = tiny_model(side_features=side_features, head_hidden=head_hidden)
    return around(CodedInvNet, model, K)


def model_of(scheme: Scheme) -> CodedModel:
    assert isinstance(scheme.code, LatentCode)
    return scheme.code.model


def exactly(scheme: Scheme, group: Tensor) -> dict[int, Tensor]:
    """Return a group's outputs with the exact mean as the parity's latent."""
    outputs = outputs_of(scheme, group)
    mean = torch.stack([outputs[i] for i in range(group.shape[1])]).mean(dim=0)
    return {**outputs, K: torch.cat([mean, outputs[K][:, LATENT:]], dim=1)}


def images(size: int) -> Tensor:
    generator = torch.Generator().manual_seed(size)
    return torch.rand(3, size, 1, 8, 8, dtype=torch.float64, generator=generator)


def assert_direct(
    method: Scheme, answers: Mapping[int, Tensor], group: Tensor, members: set[int]
) -> None:
    assert members <= set(answers)
    for member in members:
        expected = model_of(method).classify(model_of(method).embed(group[:, member]))
        torch.testing.assert_close(answers[member], expected)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("evidence", ["both", "latent", "side"])
def test_an_exact_parity_decodes_every_erasure_position(
    method: Scheme, evidence: Evidence, size: int
) -> None:
    group, model = images(size), model_of(method)
    if evidence == "side" and (model.recovery_head is None or not model.encoder.side_features):
        with pytest.raises(UserError, match="no side features to answer from"):
            resting_on(evidence, model)
        return
    scheme, side = resting_on(evidence, model), model.encode(group).side
    outputs = exactly(method, group)
    for erased in range(size):
        answers = scheme.decode(without(outputs, erased), size)
        assert set(answers) == set(range(size))
        latent, own = model.embed(group[:, erased]), side[:, erased]
        if evidence == "both":
            expected = model.recover(latent, own, size)
        elif evidence == "latent":
            expected = model.recover_from_latent(latent, own, size)
        else:
            expected = model.recover_from_side(own)
        torch.testing.assert_close(answers[erased], expected, rtol=0.0, atol=1e-10)
        assert_direct(method, answers, group, set(range(size)) - {erased})


@pytest.mark.parametrize("size", range(2, K + 1))
def test_of_several_missing_only_side_features_tell(method: Scheme, size: int) -> None:
    model, group = model_of(method), images(size)
    outputs, side = outputs_of(method, group), model.encode(group).side
    head = model.recovery_head
    assert method.rules.guesses == (head is not None and head.side_features > 0)
    for pattern in range(2**size):
        missing = {i for i in range(size) if pattern >> i & 1}
        if len(missing) < 2:
            continue
        here = without(outputs, *missing)
        assert method.rules.recoverable(frozenset(here), size) == set(range(size)) - missing
        answers = method.decode(here, size)
        assert set(answers) == set(range(size)) - (set() if method.rules.guesses else missing)
        assert_direct(method, answers, group, set(range(size)) - missing)
        for member in missing & set(answers):
            expected = model.recover_from_side(side[:, member])
            torch.testing.assert_close(answers[member], expected)
        assert set(method.decode(without(here, K), size)) == set(range(size)) - missing


@pytest.fixture(scope="module")
def mosaic() -> CodedModel:
    return tiny_model("mosaic")


def large_images(size: int) -> Tensor:
    generator = torch.Generator().manual_seed(size)
    return torch.rand(3, size, 1, 16, 16, dtype=torch.float64, generator=generator)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("evidence", ["both", "latent", "side"])
def test_a_mosaic_makes_up_for_every_set_of_missing_members(
    mosaic: CodedModel, evidence: Evidence, size: int
) -> None:
    method, group = resting_on(evidence, mosaic), large_images(size)
    outputs, parity = outputs_of(method, group), mosaic.encode(group)
    answer = {
        "both": lambda side: mosaic.recover(side, side, size),
        "latent": lambda side: mosaic.recover_from_latent(side, side, size),
        "side": mosaic.recover_from_side,
    }[evidence]
    for pattern in range(2**size):
        missing = {i for i in range(size) if pattern >> i & 1}
        here = without(outputs, *missing)
        assert method.rules.recoverable(frozenset(here), size) == set(range(size))
        answers = method.decode(here, size)
        assert set(answers) == set(range(size))
        assert_direct(method, answers, group, set(range(size)) - missing)
        for member in missing:
            torch.testing.assert_close(answers[member], answer(parity.side[:, member]))
        left = without(here, K)
        assert method.rules.recoverable(frozenset(left), size) == set(left)
        assert set(method.decode(left, size)) == set(left)


def test_the_average_image_stands_in_for_an_encoder(method: Scheme) -> None:
    average = around(AverageImage, model_of(method), K)
    model, group = model_of(method), images(K)
    outputs = outputs_of(average, group)
    torch.testing.assert_close(outputs[K], model.embed(group.mean(dim=1)).flatten(1))
    decoded = average.decode({task: out for task, out in outputs.items() if task != 2}, K)
    latent = K * outputs[K] - outputs[0] - outputs[1] - outputs[3]
    expected = model.classify(latent.unflatten(1, model.latent_shape))
    torch.testing.assert_close(decoded[2], expected)
    assert average.parameters < method.parameters
