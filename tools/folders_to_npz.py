"""Write small images that lie in a folder for each class to arrays, at the size that they have.

    python tools/folders_to_npz.py CIFAR-10-images data/cifar10

reads CIFAR-10-images/{train,test}/CLASS/* and writes data/cifar10/train.npz and test.npz, where
`--data-dir data` finds them. (Folders in a data folder are resized to `data.image_size` and
cropped, which suits photographs and spoils images of 32 pixels.)
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


def read_folder(folder: Path) -> dict[str, np.ndarray]:
    """Return `images` (N, H, W[, 3]) uint8, `labels` (N,) and `classes`, these in order of name.

    Raises:
        UserError: if there are no images, one is unreadable, or one has another shape.
    """
    if not folder.is_dir():
        raise UserError(f"there is no folder {folder}")
    classes = sorted(path.name for path in folder.iterdir() if path.is_dir())
    files = [
        (path, label)
        for label, name in enumerate(classes)
        for path in sorted((folder / name).iterdir())
    ]
    if not files:
        raise UserError(f"{folder} has no folders of images, one for each class")
    images: list[np.ndarray] = []
    for path, _ in tqdm(files, desc=folder.name, unit="image", file=sys.stderr):
        try:
            with Image.open(path) as opened:
                image = np.asarray(opened if opened.mode == "L" else opened.convert("RGB"))
        except OSError as error:
            raise UserError(f"{path}: no image: {error}") from error
        if images and image.shape != images[0].shape:
            raise UserError(f"{path} has the shape {image.shape}, the first {images[0].shape}")
        images.append(image)
    labels = np.array([label for _, label in files])
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
    found = {split: read_folder(source / split) for split in paths}
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
