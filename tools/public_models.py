"""Export a public ResNet for CIFAR-10 to ONNX, as PyTorch's classic exporter writes it.

    python tools/public_models.py resnet56-4bfd9763.th resnet56.onnx

The `.th` files are those of github.com/akamaster/pytorch_resnet_cifar10 (pretrained_models/):
ResNets of 6n + 2 layers (He et al., CVPR 2016, section 4.2) whose shortcuts are padded with zeros.
The exported models take images in 0..1 and normalise them themselves.
"""

from __future__ import annotations

import sys

import torch
import torch.nn.functional as F
from torch import Tensor, nn

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class Block(nn.Module):
    """Two convolutions, and a shortcut without weights."""

    def __init__(self, before: int, channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(before, channels, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.stride, self.more = stride, channels - before

    def forward(self, x: Tensor) -> Tensor:
        h = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        if self.more:
            half = self.more // 2
            x = F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, half, half))
        return F.relu(h + x)


def stage(before: int, channels: int, n: int, stride: int) -> nn.Sequential:
    """Return n blocks, the first of which may have a stride."""
    rest = [Block(channels, channels, 1) for _ in range(n - 1)]
    return nn.Sequential(Block(before, channels, stride), *rest)


class ResNet(nn.Module):
    """A ResNet for CIFAR-10 with n blocks in each of three stages."""

    def __init__(self, n: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16)
        self.layer1 = stage(16, 16, n, 1)
        self.layer2 = stage(16, 32, n, 2)
        self.layer3 = stage(32, 64, n, 2)
        self.linear = nn.Linear(64, 10)
        self.register_buffer("mean", torch.tensor(MEAN)[:, None, None], persistent=False)
        self.register_buffer("std", torch.tensor(STD)[:, None, None], persistent=False)
        self.mean: Tensor
        self.std: Tensor

    def forward(self, images: Tensor) -> Tensor:
        h = F.relu(self.bn1(self.conv1((images - self.mean) / self.std)))
        for layer in (self.layer1, self.layer2, self.layer3):
            h = layer(h)
        logits: Tensor = self.linear(F.avg_pool2d(h, h.shape[3]).flatten(1))
        return logits


def resnet(path: str) -> ResNet:
    """Return the network whose weights a file has."""
    stored = torch.load(path, map_location="cpu", weights_only=True)["state_dict"]
    state = {name.removeprefix("module."): tensor for name, tensor in stored.items()}
    network = ResNet(sum(name.startswith("layer1.") and "conv1" in name for name in state))
    network.load_state_dict(state)
    return network


def main(weights: str, out: str) -> None:
    """Export the network whose weights a file has."""
    axes = {"images": {0: "batch"}, "logits": {0: "batch"}}
    torch.onnx.export(
        resnet(weights).eval(),
        (torch.zeros(1, 3, 32, 32),),
        out,
        input_names=["images"],
        output_names=["logits"],
        dynamic_axes=axes,
        dynamo=False,
    )


if __name__ == "__main__":
    main(*sys.argv[1:])
