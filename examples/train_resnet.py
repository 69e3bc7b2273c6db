"""An ordinary training of a plain ResNet, as a user has one: nothing of this package is used.

    python examples/train_resnet.py --data data/cifar10 --out runs/resnet --epochs 16

It reads `train.npz` and `test.npz` (arrays `images` (N, H, W, 3) uint8 and `labels` (N,)), keeps
the last tenth of the training images for validation, and writes `resnet.onnx`. That takes pixels as
floats in 0..255 in the order (B, 3, H, W). A killed training goes on with its last epoch.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

NARROW = 16
"""Strided 1×1 convolutions of fewer channels can crash in the memory format that is used here."""
BUG = "https://github.com/uxlfoundation/oneDNN/issues/6035"


class Block(nn.Module):
    """Two 3×3 convolutions beside a shortcut."""

    def __init__(self, before: int, after: int, stride: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(before, after, 3, stride, 1, bias=False)
        self.second = nn.Conv2d(after, after, 3, 1, 1, bias=False)
        self.norms = nn.ModuleList([nn.BatchNorm2d(after), nn.BatchNorm2d(after)])
        self.shortcut = (
            nn.Identity()
            if before == after and stride == 1
            else nn.Sequential(
                nn.Conv2d(before, after, 1, stride, bias=False), nn.BatchNorm2d(after)
            )
        )

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.norms[0](self.first(x)))
        return F.relu(self.norms[1](self.second(h)) + self.shortcut(x))


class ResNet(nn.Module):
    """Pixels in 0..255, (B, 3, H, W), to logits."""

    mean: Tensor
    std: Tensor

    def __init__(self, width: int, blocks: list[int], classes: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor([125.3, 123.0, 113.9])[:, None, None])
        self.register_buffer("std", torch.tensor([63.0, 62.1, 66.7])[:, None, None])
        widths = [width * 2**stage for stage in range(len(blocks))]
        layers: list[nn.Module] = [
            nn.Conv2d(3, width, 3, 1, 1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(),
        ]
        before = width
        for stage, (after, count) in enumerate(zip(widths, blocks, strict=True)):
            for number in range(count):
                layers.append(Block(before, after, 2 if stage and not number else 1))
                before = after
        self.body = nn.Sequential(*layers)
        self.classify = nn.Linear(before, classes)

    def forward(self, pixels: Tensor) -> Tensor:
        h = self.body((pixels - self.mean) / self.std)
        logits: Tensor = self.classify(h.mean(dim=(2, 3)))
        return logits


def read(path: Path) -> tuple[Tensor, Tensor]:
    """Return images (N, 3, H, W) uint8 and labels."""
    with np.load(path) as arrays:
        images = torch.from_numpy(arrays["images"]).permute(0, 3, 1, 2).contiguous()
        return images, torch.from_numpy(arrays["labels"].astype(np.int64))


def augmented(x: Tensor, generator: torch.Generator) -> Tensor:
    """Mirror half of the images, and shift each by up to 4 pixels."""
    mirrored = torch.rand(len(x), generator=generator) < 0.5
    x = torch.where(mirrored[:, None, None, None], x.flip(3), x)
    size = x.shape[-1]
    x = F.pad(x, (4, 4, 4, 4))
    down, right = torch.randint(0, 9, (2, len(x)), generator=generator).tolist()
    return torch.stack(
        [
            image[:, top : top + size, left : left + size]
            for image, top, left in zip(x, down, right, strict=True)
        ]
    )


@torch.no_grad()
def accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    """Return the share of images (N, 3, H, W) that are classified right."""
    model.eval()
    right = [
        (model(x.float()).argmax(1) == y).float()
        for x, y in zip(images.split(500), labels.split(500), strict=True)
    ]
    return float(torch.cat(right).mean())


def main() -> None:
    """Train, or go on, and export."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--epochs", type=int, default=16)
    parser.add_argument("--width", type=int, default=32)
    parser.add_argument("--blocks", type=int, nargs="+", default=[1, 1, 1])
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--rate", type=float, default=0.4)
    parser.add_argument("--bfloat16", action="store_true")
    arguments = parser.parse_args()
    if arguments.width < NARROW:
        parser.error(f"--width is at least {NARROW}: fewer channels can crash PyTorch ({BUG})")
    arguments.out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)

    images, labels = read(arguments.data / "train.npz")
    train = len(images) - len(images) // 10
    if set(labels.tolist()) != set(labels[:train].tolist()):
        parser.error("the last tenth of the images has classes that the rest lacks: mix them first")
    model = ResNet(arguments.width, arguments.blocks, int(labels.max()) + 1)
    model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    optimizer = torch.optim.SGD(
        model.parameters(), lr=arguments.rate, momentum=0.9, weight_decay=5e-4, nesterov=True
    )
    steps = train // arguments.batch_size
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, arguments.rate, total_steps=arguments.epochs * steps, pct_start=0.25
    )
    checkpoint, began = arguments.out / "checkpoint.pt", 0
    if checkpoint.is_file():
        state = torch.load(checkpoint, weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        schedule.load_state_dict(state["schedule"])
        began = state["epoch"]
    for epoch in range(began, arguments.epochs):
        started = time.time()
        generator = torch.Generator().manual_seed(epoch)
        order = torch.randperm(train, generator=generator)
        model.train()
        for step in range(steps):
            rows = order[step * arguments.batch_size :][: arguments.batch_size]
            x = augmented(images[rows].float(), generator).to(memory_format=torch.channels_last)
            with torch.autocast("cpu", torch.bfloat16, enabled=arguments.bfloat16):
                logits = model(x)
            loss = F.cross_entropy(logits.float(), labels[rows], label_smoothing=0.1)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            schedule.step()
            if step % 50 == 0:
                print(f"{epoch} {step}/{steps} {float(loss.detach()):.3f}", flush=True)
        found = accuracy(model, images[train:], labels[train:])
        print(
            f"epoch {epoch + 1}: validation {found:.4f}, {time.time() - started:.0f} s", flush=True
        )
        state = {
            "model": model.state_dict(),
            "optimizer": optimizer.state_dict(),
            "schedule": schedule.state_dict(),
            "epoch": epoch + 1,
        }
        torch.save(state, checkpoint.with_suffix(".new"))
        os.replace(checkpoint.with_suffix(".new"), checkpoint)

    model.eval()
    examples = torch.zeros(2, *images.shape[1:])
    torch.onnx.export(
        model,
        (examples,),
        arguments.out / "resnet.onnx",
        input_names=["pixels"],
        output_names=["logits"],
        dynamic_shapes=({0: torch.export.Dim.DYNAMIC},),
        external_data=False,
    )
    test = accuracy(model, *read(arguments.data / "test.npz"))
    (arguments.out / "accuracy.json").write_text(json.dumps({"test_accuracy": test}) + "\n")
    print(f"test accuracy {test:.4f}")


if __name__ == "__main__":
    main()
