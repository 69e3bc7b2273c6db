from __future__ import annotations

import pytest
import torch
from torch import Tensor

from codedinvnet.errors import UserError
from codedinvnet.evaluation.comparisons import compare
from codedinvnet.evaluation.outputs import BATCH, direct_answers
from tests.evaluation.test_accuracy import Exact, Undecodable, image_set, one_hot, scheme_of

CPU = torch.device("cpu")


def test_direct_answers_are_computed_in_batches() -> None:
    sizes = []

    class Watched(Exact):
        def direct(self, output: Tensor) -> Tensor | None:
            sizes.append(len(output))
            return super().direct(output)

    own = torch.arange(2.0 * (2 * BATCH + 7)).view(-1, 2)
    assert torch.equal(direct_answers(scheme_of(Watched(2)), own, CPU), one_hot(own[:, 1]))
    assert sizes == [BATCH, BATCH, 7]


def test_a_code_without_direct_answers_has_none() -> None:
    class Silent(Exact):
        def direct(self, output: Tensor) -> Tensor | None:
            return None

    with pytest.raises(ValueError, match="not systematic"):
        direct_answers(scheme_of(Silent(2)), torch.zeros(3, 2), CPU)


def test_a_comparison_tells_which_member_a_method_cannot_decode() -> None:
    with pytest.raises(UserError, match="exact cannot decode member 1 of a group of 4"):
        compare(scheme_of(Undecodable(4)), image_set(8), k=4)
