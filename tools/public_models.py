"""Export a public CIFAR-10 network to ONNX, as PyTorch's classic exporter writes it.

    python tools/public_models.py resnet56-4bfd9763.th resnet56.onnx
    python tools/public_models.py cnn_model.h5 keras.onnx

`.th` files are those of github.com/akamaster/pytorch_resnet_cifar10 (pretrained_models/), ResNets
of 6n + 2 layers (He et al., CVPR 2016, section 4.2) whose shortcuts are padded with zeros. The
`.h5` is the PyPI package cifar-10-model's (trained_models/), six convolutions that Keras trained;
it needs h5py. The exported models take images in 0..1 and normalise them themselves.
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


class FromKeras(nn.Module):
    """The package's network: convolutions that are normalised after the ReLU, and an MLP."""

    def __init__(self, path: str) -> None:
        super().__init__()
        import h5py  # type: ignore[import-not-found]

        def arrays(kind: str, number: int, *names: str) -> list[Tensor]:
            name = f"{kind}_{number}" if number else kind
            with h5py.File(path) as file:
                found = file["model_weights"][name][name]
                return [torch.from_numpy(found[f"{each}:0"][()]) for each in names]

        layers: list[nn.Module] = []
        for number in range(6):
            weight, bias = arrays("conv2d", number, "kernel", "bias")
            conv = nn.Conv2d(weight.shape[2], weight.shape[3], 3)
            kernel = weight.permute(3, 2, 0, 1).contiguous()
            conv.weight, conv.bias = nn.Parameter(kernel), nn.Parameter(bias)
            norm = nn.BatchNorm2d(len(bias), eps=1e-3)
            norm.weight.data, norm.bias.data, norm.running_mean, norm.running_var = arrays(
                "batch_normalization", number, "gamma", "beta", "moving_mean", "moving_variance"
            )
            layers += [conv, nn.ReLU(), norm, *([nn.MaxPool2d(2)] if number in (1, 3) else [])]
        layers.append(nn.Flatten())
        for number in range(3):
            weight, bias = arrays("dense", number, "kernel", "bias")
            dense = nn.Linear(*weight.shape)
            dense.weight.data, dense.bias.data = weight.t().contiguous(), bias
            layers += [dense, nn.ReLU()]
        self.layers = nn.Sequential(*layers)

    def forward(self, images: Tensor) -> Tensor:
        scores: Tensor = self.layers(255 * images)
        return scores


def resnet(path: str) -> ResNet:
    """Return the network whose weights a file has."""
    stored = torch.load(path, map_location="cpu", weights_only=True)["state_dict"]
    state = {name.removeprefix("module."): tensor for name, tensor in stored.items()}
    network = ResNet(sum(name.startswith("layer1.") and "conv1" in name for name in state))
    network.load_state_dict(state)
    return network


def main(weights: str, out: str) -> None:
    """Export the network whose weights a file has."""
    network = FromKeras(weights) if weights.endswith(".h5") else resnet(weights)
    axes = {"images": {0: "batch"}, "logits": {0: "batch"}}
    torch.onnx.export(
        network.eval(),
        (torch.zeros(1, 3, 32, 32),),
        out,
        input_names=["images"],
        output_names=["logits"],
        dynamic_axes=axes,
        dynamo=False,
    )


if __name__ == "__main__":
    main(*sys.argv[1:])
