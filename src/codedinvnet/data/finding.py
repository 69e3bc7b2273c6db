"""Where image sets are looked for, and what is said when there is none."""

from __future__ import annotations

import os
from pathlib import Path

from codedinvnet.data.formats import read_cifar10, read_idx_pair, read_npz
from codedinvnet.data.names import KNOWN, did_you_mean, spellings
from codedinvnet.data.sources import ImageFolder, ImageSource, Split
from codedinvnet.errors import UserError


def cache_dir() -> Path:
    """Return the folder of downloaded images and exports, which need not be there yet.

    Raises:
        RuntimeError: if this user has no home, and no variable names a folder.
    """
    if own := os.environ.get("CODEDINVNET_CACHE"):
        return Path(own)
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "codedinvnet"


def look_in(root: Path, name: str, split: Split, image_size: int | None) -> ImageSource | None:
    """Try every layout below root; None if none of them is there."""
    for spelling in spellings(name):
        path = root / spelling / f"{split}.npz"
        if path.is_file():
            try:
                with path.open("rb") as stream:
                    return read_npz(stream, name, str(path))
            except OSError as error:
                raise UserError(f"{path}: unreadable: {error}") from error
    known = KNOWN.get(name)
    if known is not None and (root / known.folder).is_dir():
        if known.dataset == "CIFAR10":
            return read_cifar10(root, split)
        pair = read_idx_pair(root / known.folder, name, split)
        if pair is not None:
            return pair
    parents = [root / spelling for spelling in spellings(name)]
    if name == "imagenet":
        parents.append(root)
    for parent in parents:
        for folder in _folder_splits(name, split):
            if (parent / folder).is_dir():
                size = 224 if image_size is None else image_size
                return ImageFolder(name, parent / folder, size)
    return None


def layouts(root: Path, name: str, split: Split) -> str:
    """Say what is looked for below root."""
    known = KNOWN.get(name)
    looked = [str(root / name / f"{split}.npz")]
    if known is not None:
        looked.append(f"{root / known.folder}{os.sep} (torchvision's files)")
    folders = " or ".join(_folder_splits(name, split))
    looked.append(f"{root / name}{os.sep} with {folders} and a folder of images for each class")
    return ", ".join(looked)


def nothing_found(root: Path, name: str, split: Split) -> str:
    """Say that root does not hold the images, and what would help."""
    hint = ""
    if not root.exists():
        what = f"data folder {root} does not exist"
    elif not root.is_dir():
        what = f"{root} is not a folder"
    elif not any(root.iterdir()):
        what = f"data folder {root} is empty"
    else:
        what = f"data folder {root} holds no {split} images of {name!r}"
        there = {entry.name for entry in root.iterdir() if entry.is_dir()}
        there -= {Path(known.folder).parts[0] for known in KNOWN.values()}
        hint = did_you_mean(name, {*KNOWN, *there} - {name})
    mend = "put one of these there"
    if name in KNOWN:
        mend += ", or leave --data-dir out to download the images"
    return f"{what}{hint}; looked for {layouts(root, name, split)}; {mend}"


def _folder_splits(name: str, split: Split) -> tuple[str, ...]:
    """Return the folders that may hold a split, the first that is there being it.

    ImageNet's published test images have no labels, so that its validation images come first.
    """
    if split == "train":
        return ("train",)
    return ("val", "test") if name == "imagenet" else ("test", "val")
