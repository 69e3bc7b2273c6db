from __future__ import annotations

from collections.abc import Mapping
from itertools import chain, combinations

import pytest
import torch
from torch import Tensor

from codedinvnet.codes.base import Scheme
from codedinvnet.codes.invnet import AverageImage, CodedInvNet
from codedinvnet.models.coded import CodedModel
from tests.codes.linear import around, outputs_of, tiny_model, without

K = 4
SIZES = range(1, K + 1)


@pytest.fixture(scope="module")
def model() -> CodedModel:
    return tiny_model()


@pytest.fixture(scope="module")
def method(model: CodedModel) -> Scheme:
    return around(CodedInvNet, model, K)


def images(size: int) -> Tensor:
    generator = torch.Generator().manual_seed(size)
    return torch.rand(3, size, 1, 8, 8, dtype=torch.float64, generator=generator)


def assert_direct(
    model: CodedModel, answers: Mapping[int, Tensor], group: Tensor, members: set[int]
) -> None:
    assert members <= set(answers)
    for member in members:
        expected = model.classify(model.embed(group[:, member]))
        torch.testing.assert_close(answers[member], expected, rtol=0.0, atol=1e-10)


@pytest.mark.parametrize("size", SIZES)
def test_an_exact_parity_decodes_every_erasure_position(
    method: Scheme, model: CodedModel, size: int
) -> None:
    group = images(size)
    outputs = outputs_of(method, group)
    outputs[K] = torch.stack([outputs[i] for i in range(size)]).mean(dim=0)
    for erased in range(size):
        answers = method.decode(without(outputs, erased), size)
        assert_direct(model, answers, group, set(range(size)))


@pytest.mark.parametrize("size", SIZES)
def test_a_parity_makes_up_for_one_member_and_no_more(
    method: Scheme, model: CodedModel, size: int
) -> None:
    group = images(size)
    outputs = outputs_of(method, group)
    assert torch.equal(outputs[K], model.encode(group).flatten(1))
    members = range(size)
    for missing in chain.from_iterable(combinations(members, n) for n in range(size + 1)):
        left = set(members) - set(missing)
        for here, answered in (
            (without(outputs, *missing), left if len(missing) > 1 else set(members)),
            (without(outputs, *missing, K), left),
        ):
            assert method.rules.recoverable(frozenset(here), size) == answered
            answers = method.decode(here, size)
            assert set(answers) == answered
            assert_direct(model, answers, group, left)


def test_the_average_image_stands_in_for_an_encoder(method: Scheme, model: CodedModel) -> None:
    average, group = around(AverageImage, model, K), images(K)
    outputs = outputs_of(average, group)
    torch.testing.assert_close(outputs[K], model.embed(group.mean(dim=1)).flatten(1))
    decoded = average.decode(without(outputs, 2), K)
    latent = K * outputs[K] - outputs[0] - outputs[1] - outputs[3]
    expected = model.classify(latent.unflatten(1, model.latent_shape))
    torch.testing.assert_close(decoded[2], expected)
    assert average.parameters < method.parameters
