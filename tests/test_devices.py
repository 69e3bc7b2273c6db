from __future__ import annotations

import torch
from torch import nn

from codedinvnet.devices import first_tensor
from codedinvnet.models.network import ImageNetwork


def test_a_model_without_parameters() -> None:
    network = ImageNetwork(nn.Flatten(), (1, 2, 2))
    assert network(torch.rand(3, 1, 2, 2)).shape == (3, 4)


def test_whole_numbers_do_not_tell_a_modules_type() -> None:
    norm = nn.BatchNorm2d(3, affine=False)
    norm.num_batches_tracked, norm.running_mean = torch.tensor(0), torch.zeros(3).double()
    assert first_tensor(nn.Sequential(norm)).dtype == torch.float64
    assert first_tensor(nn.Sequential(norm, nn.Linear(2, 2))).dtype == torch.float32
