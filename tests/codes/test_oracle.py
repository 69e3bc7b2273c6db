from __future__ import annotations

import pytest
import torch

from codedinvnet.codes.oracle import Oracle
from codedinvnet.models.coded import CodedModel
from codedinvnet.nn.lipschitz import constrain_exactly
from tests.codes.linear import around, outputs_of, tiny_model, without

K = 4


@pytest.fixture(scope="module")
def model() -> CodedModel:
    model = tiny_model()
    constrain_exactly(model.network)
    return model


@pytest.mark.parametrize("size", range(1, K + 1))
def test_every_erasure_position_is_answered_as_if_nobody_were_missing(
    model: CodedModel, size: int
) -> None:
    method = around(Oracle, model, K)
    group = torch.rand(3, size, 1, 8, 8, dtype=torch.float64)
    outputs = outputs_of(method, group)
    right = [model.classify(model.embed(group[:, i])) for i in range(size)]
    for lost in range(size):
        answers = method.decode(without(outputs, lost), size)
        assert set(answers) == set(range(size))
        for member in range(size):
            torch.testing.assert_close(answers[member], right[member], rtol=0.0, atol=1e-3)
    assert method.compute(K, group).encode_seconds > 0
