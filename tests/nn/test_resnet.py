from __future__ import annotations

import torch
from torch import nn

from codedinvnet.codes.equal_cost import count_macs
from codedinvnet.nn.resnet import ResNet, width_of_cost


def test_resnet18_has_its_layers_and_parameters() -> None:
    network = ResNet(3, 10, width=64)
    convolutions = [m for m in network.modules() if isinstance(m, nn.Conv2d)]
    assert sum(c.kernel_size == (3, 3) for c in convolutions) == 17
    assert sum(p.numel() for p in network.parameters()) == 11_173_962  # as published for CIFAR-10
    x = torch.rand(2, 3, 32, 32)
    assert network.eval().stages(torch.rand(2, 64, 32, 32)).shape == (2, 512, 4, 4)
    assert network(x).shape == (2, 10)


def test_width_of_cost_is_the_largest_within_the_budget() -> None:
    def cost(width: int) -> int:
        network = ResNet(1, 10, width=width, blocks=(1, 1)).eval()
        return count_macs(lambda: network(torch.rand(1, 1, 16, 16)))

    width = width_of_cost(cost, 500_000)
    assert cost(width) <= 500_000 < cost(width + 1)
    assert width_of_cost(cost, 0) == 1
