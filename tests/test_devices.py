from __future__ import annotations

import pytest
import torch
from torch import nn

from codedinvnet.classifier import ImageClassifier
from codedinvnet.devices import first_tensor
from codedinvnet.methods import ApproxIFER, CodedMethod, Uncoded


@pytest.mark.parametrize("kind", [Uncoded, ApproxIFER])
def test_a_classifier_without_parameters(kind: type[Uncoded] | type[ApproxIFER]) -> None:
    images = torch.rand(1, 2, 1, 2, 2)
    method: CodedMethod = kind(ImageClassifier(nn.Flatten()), 2)
    assert method.parameters == 0
    members = images[:, :1] if kind is Uncoded else images
    assert method.compute(0, members).shape == (1, 4)


def test_whole_numbers_do_not_tell_a_modules_type() -> None:
    norm = nn.BatchNorm2d(3, affine=False)
    norm.num_batches_tracked, norm.running_mean = torch.tensor(0), torch.zeros(3).double()
    assert first_tensor(nn.Sequential(norm)).dtype == torch.float64
    assert first_tensor(nn.Sequential(norm, nn.Linear(2, 2))).dtype == torch.float32
