"""Write small images that lie in a folder for each class to arrays, at the size that they have.

    python tools/folders_to_npz.py CIFAR-10-images data/cifar10

reads CIFAR-10-images/{train,test}/CLASS/* and writes data/cifar10/train.npz and test.npz, where
`--data-dir data` finds them. (Folders in a data folder are resized to `data.image_size` and
cropped, which suits photographs and spoils images of 32 pixels.)

    python tools/folders_to_npz.py tiny-imagenet-200 data/tiny-imagenet

reads Tiny-ImageNet as it is published: train/CLASS/images/*, and for the test split its val/images,
whose classes stand in val/val_annotations.txt. (Its own test images have no labels.)
"""

from __future__ import annotations

import argparse
import io
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

from codedinvnet.cli.common import guarded
from codedinvnet.errors import UserError
from codedinvnet.files import check_writable, write_atomically

ANNOTATIONS = "val_annotations.txt"
"""Tiny-ImageNet's list of its validation images: file, class and box, between tabs."""


def in_folders(folder: Path) -> list[tuple[Path, str]]:
    """Return the images of CLASS/* or CLASS/images/*, each with its class.

    Raises:
        UserError: if there is no such folder.
    """
    if not folder.is_dir():
        raise UserError(f"there is no folder {folder}")
    found = []
    for path in sorted(path for path in folder.iterdir() if path.is_dir()):
        nested = path / "images"
        images = nested if nested.is_dir() else path
        found += [(image, path.name) for image in sorted(images.iterdir())]
    return found


def annotated(folder: Path) -> list[tuple[Path, str]]:
    """Return the images of Tiny-ImageNet's validation part, each with its class.

    Raises:
        UserError: if a line of the list is not as published.
    """
    found = []
    for number, line in enumerate((folder / ANNOTATIONS).read_text().splitlines(), 1):
        columns = line.split("\t")
        if len(columns) < 2:
            raise UserError(f"{folder / ANNOTATIONS}, line {number}: not FILE, tab, CLASS: {line}")
        found.append((folder / "images" / columns[0], columns[1]))
    return found


def read_folder(folder: Path) -> dict[str, np.ndarray]:
    """Return `images` (N, H, W[, 3]) uint8, `labels` (N,) and `classes`, these in order of name.

    Grey images are in colour if any other is.

    Raises:
        UserError: if there are no images, one is unreadable, or one has another shape.
    """
    files = annotated(folder) if (folder / ANNOTATIONS).is_file() else in_folders(folder)
    if not files:
        raise UserError(f"{folder} has no folders of images, one for each class")
    classes = sorted({name for _, name in files})
    numbers = {name: number for number, name in enumerate(classes)}
    images: list[np.ndarray] = []
    for path, _ in tqdm(files, desc=folder.name, unit="image", file=sys.stderr):
        try:
            with Image.open(path) as opened:
                image = np.asarray(opened if opened.mode == "L" else opened.convert("RGB"))
        except OSError as error:
            raise UserError(f"{path}: no image: {error}") from error
        if images and image.shape[:2] != images[0].shape[:2]:
            raise UserError(f"{path} has the shape {image.shape}, the first {images[0].shape}")
        images.append(image)
    if len({image.ndim for image in images}) > 1:  # grey ones among those in colour
        images = [np.stack([one] * 3, axis=2) if one.ndim == 2 else one for one in images]
    labels = np.array([numbers[name] for _, name in files])
    return {"images": np.stack(images), "labels": labels, "classes": np.array(classes)}


def main(words: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("source", type=Path, help="has train/CLASS/* and test/CLASS/*")
    parser.add_argument("target", type=Path, help="gets train.npz and test.npz")
    arguments = parser.parse_args(words)
    return guarded(lambda: convert(arguments.source, arguments.target))


def convert(source: Path, target: Path) -> None:
    """Read the folders of both splits, then write their arrays.

    Raises:
        UserError: if one cannot be read, the target not be written, or the classes differ.
    """
    paths = {split: target / f"{split}.npz" for split in ("train", "test")}
    for path in paths.values():
        check_writable(path)
    tiny = (source / "val" / ANNOTATIONS).is_file()
    folders = {"train": source / "train", "test": source / ("val" if tiny else "test")}
    found = {split: read_folder(folders[split]) for split in paths}
    train, test = (arrays["classes"].tolist() for arrays in found.values())
    if train != test:
        other = ", ".join(sorted(set(train) ^ set(test)))
        raise UserError(f"{source}: train and test have other classes: {other}")
    for split, arrays in found.items():
        content = io.BytesIO()
        np.savez_compressed(content, **arrays)  # type: ignore[arg-type]
        write_atomically(paths[split], content.getvalue())
        print(f"{paths[split]}: {len(arrays['labels'])} images of {len(train)} classes")


if __name__ == "__main__":
    sys.exit(main())
