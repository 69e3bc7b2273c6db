"""Write images that lie in a folder for each class to arrays.

    python tools/folders_to_npz.py CIFAR-10-images data/cifar10

reads CIFAR-10-images/{train,test}/CLASS/* and writes data/cifar10/train.npz and test.npz, where
`--data-dir data` finds them. A third argument, a side in pixels, resizes all images to it and crops
them to their centres.

    python tools/folders_to_npz.py tiny-imagenet-200 data/tiny-imagenet

reads Tiny-ImageNet as it is published: the test split is its val/images, whose classes stand in
val/val_annotations.txt. (Its own test images have no labels.)
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps
from torchvision.datasets import ImageFolder

ANNOTATIONS = "val_annotations.txt"
"""Tiny-ImageNet's list of its validation images: file, class and box, between tabs."""


def labelled(folder: Path, classes: Sequence[str]) -> list[tuple[str, int]]:
    """Return the images of a split, each with the number of its class."""
    if (folder / ANNOTATIONS).is_file():
        rows = [line.split("\t") for line in (folder / ANNOTATIONS).read_text().splitlines()]
        return [(str(folder / "images" / row[0]), classes.index(row[1])) for row in rows]
    found = ImageFolder(folder)
    if list(classes) != found.classes:
        raise SystemExit(f"error: {folder} has other classes than the training images")
    return list(found.samples)


def main(source: str, target: str, side: str = "") -> None:
    """Read both splits of a source, and write their arrays into a target."""
    root, classes = Path(source), ImageFolder(Path(source) / "train").classes
    tiny = (root / "val" / ANNOTATIONS).is_file()
    Path(target).mkdir(parents=True, exist_ok=True)
    for split, folder in (("train", "train"), ("test", "val" if tiny else "test")):
        files = labelled(root / folder, classes)
        opened = [Image.open(path) for path, _ in files]
        mode = "L" if all(image.mode == "L" for image in opened) else "RGB"
        images = [image.convert(mode) for image in opened]
        if side:
            images = [ImageOps.fit(image, (int(side), int(side))) for image in images]
        np.savez_compressed(
            Path(target) / f"{split}.npz",
            images=np.stack([np.asarray(image) for image in images]),
            labels=np.array([label for _, label in files]),
            classes=np.array(classes),
        )


if __name__ == "__main__":
    main(*sys.argv[1:])
