"""Opening image sets by name: from files, by a download, or the samples that ship."""

from __future__ import annotations

import contextlib
import os
import re
import socket
import sys
import tarfile
import tempfile
import zlib
from collections.abc import Iterable
from dataclasses import dataclass
from http.client import HTTPException
from importlib import resources
from pathlib import Path

from codedinvnet.common.errors import UserError, nearest
from codedinvnet.data.formats import read_cifar10, read_idx_pair, read_npz
from codedinvnet.data.sources import ImageFolder, ImageSet, ImageSource, Split

DEBIAN_FASHION = Path("/usr/share/datasets/fashion-mnist")  # package dataset-fashion-mnist
SAMPLES = ("mnist", "fashion")
_NETWORK_TIMEOUT = 30.0  # seconds without an answer; urllib would otherwise wait for ever


@dataclass(frozen=True)
class Known:
    """What is known of an image set by its name."""

    classes: tuple[str, ...]
    dataset: str  # class in torchvision.datasets
    folder: str  # where torchvision puts its files, below its root
    aliases: tuple[str, ...] = ()


_CLOTHES = (
    *("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat"),
    *("Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot"),
)
_OBJECTS = (
    *("airplane", "automobile", "bird", "cat", "deer"),
    *("dog", "frog", "horse", "ship", "truck"),
)
KNOWN = {
    "mnist": Known(tuple("0123456789"), "MNIST", "MNIST/raw"),
    "fashion": Known(_CLOTHES, "FashionMNIST", "FashionMNIST/raw", aliases=("fashion-mnist",)),
    "cifar10": Known(_OBJECTS, "CIFAR10", "cifar-10-batches-py"),
}


def cache_dir() -> Path:
    """Return the folder of downloaded images and exports, which need not be there yet.

    Raises:
        RuntimeError: if this user has no home, and no variable names a folder.
    """
    if own := os.environ.get("CODEDINVNET_CACHE"):
        return Path(own)
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "codedinvnet"


def load_images(
    name: str,
    split: Split,
    *,
    data_dir: Path | None = None,
    download: bool = False,
    image_size: int | None = None,
) -> ImageSource:
    """Find and open an image set.

    These are looked for in `data_dir`, in this order: `<name>/train.npz` (or `test.npz`) with
    arrays `images` (N, H, W) or (N, H, W, C) uint8 and `labels` (N,), and if wanted `classes`,
    the names; torchvision's files, if the name is mnist, fashion or cifar10; and image folders,
    `<name>/train/<class>/` (`test`, or else `val`). Of imagenet `val` goes before `test`, and
    `data_dir` may itself be the folder that holds `train` and `val`.

    Without `data_dir`, they are looked for in the cache folder, then where Debian installs
    Fashion-MNIST, and then they are downloaded into the cache folder.

    Args:
        name: mnist, fashion (or fashion-mnist), cifar10, imagenet, or that of your own set.
        split: which of its two parts.
        data_dir: the only folder to look in.
        download: download into `data_dir` what is not there.
        image_size: height and width in pixels to which images from image folders are brought,
            by default 224; other images keep their own size.

    Raises:
        UserError: if nothing is found, a file is damaged, or a download fails.
    """
    if not re.fullmatch(r"\w[\w.-]*", name):
        raise UserError(f"image set {name!r}: a name has only letters, digits, '.', '_' and '-'")
    if split not in ("train", "test"):
        raise UserError(f"split {split!r} is neither 'train' nor 'test'")
    name = _canonical(name)
    root = cache_dir() if data_dir is None else Path(data_dir)
    found = _look_in(root, name, split, image_size)
    if found is not None:
        return found
    if data_dir is not None and (not download or name not in KNOWN):
        raise UserError(_nothing_found(root, name, split))
    if data_dir is None and name == "fashion" and DEBIAN_FASHION.is_dir():
        found = read_idx_pair(DEBIAN_FASHION, name, split, KNOWN[name].classes)
        if found is not None:
            return found
    if name not in KNOWN:
        raise UserError(
            f"image set {name!r} cannot be downloaded{_did_you_mean(name, KNOWN)}; these can: "
            f"{', '.join(KNOWN)}; for another, name a data folder with one of: "
            f"{_layouts(Path('DIR'), name, split)}"
        )
    _download(name, split, root)
    found = _look_in(root, name, split, image_size)
    if found is None:
        raise UserError(_nothing_found(root, name, split))
    return found


def sample_images(name: str) -> ImageSet:
    """Open the 1,000 test images of mnist or fashion that ship in the package.

    Raises:
        UserError: if no images of that name ship.
    """
    known = _canonical(name)
    if known not in SAMPLES:
        raise UserError(
            f"no sample images of {name!r} ship{_did_you_mean(name, SAMPLES)}; "
            f"these do: {', '.join(SAMPLES)}"
        )
    label = f"samples/{known}.npz"
    with resources.files("codedinvnet").joinpath(label).open("rb") as stream:
        return read_npz(stream, known, f"codedinvnet/{label}", KNOWN[known].classes)


def _canonical(name: str) -> str:
    """Return the one name of an image set that goes by several."""
    return next((known for known, facts in KNOWN.items() if name in facts.aliases), name)


def _spellings(name: str) -> tuple[str, ...]:
    return (name, *KNOWN[name].aliases) if name in KNOWN else (name,)


def _did_you_mean(name: str, options: Iterable[str]) -> str:
    near = nearest(name, options)
    return f" (did you mean {near!r}?)" if near is not None else ""


def _look_in(root: Path, name: str, split: Split, image_size: int | None) -> ImageSource | None:
    """Try every layout below root; None if none of them is there."""
    known = KNOWN.get(name)
    for spelling in _spellings(name):
        path = root / spelling / f"{split}.npz"
        if path.is_file():
            try:
                with path.open("rb") as stream:
                    return read_npz(stream, name, str(path), known.classes if known else ())
            except OSError as error:
                raise UserError(f"{path}: unreadable: {error}") from error
    if known is not None and (root / known.folder).is_dir():
        if known.dataset == "CIFAR10":
            return read_cifar10(root, split, known.classes)
        pair = read_idx_pair(root / known.folder, name, split, known.classes)
        if pair is not None:
            return pair
    parents = [root / spelling for spelling in _spellings(name)]
    if name == "imagenet":
        parents.append(root)
    for parent in parents:
        for folder in _folder_splits(name, split):
            if (parent / folder).is_dir():
                return ImageFolder(name, parent / folder, 224 if image_size is None else image_size)
    return None


def _folder_splits(name: str, split: Split) -> tuple[str, ...]:
    """Return the folders that may hold a split, the first that is there being it.

    ImageNet's published test images have no labels, so its validation images come first.
    """
    if split == "train":
        return ("train",)
    return ("val", "test") if name == "imagenet" else ("test", "val")


def _layouts(root: Path, name: str, split: Split) -> str:
    """Say what is looked for below root."""
    looked = [str(root / name / f"{split}.npz")]
    if name in KNOWN:
        looked.append(f"{root / KNOWN[name].folder}{os.sep} (torchvision's files)")
    folders = " or ".join(_folder_splits(name, split))
    looked.append(f"{root / name}{os.sep} with {folders} and a folder of images for each class")
    return ", ".join(looked)


def _nothing_found(root: Path, name: str, split: Split) -> str:
    """Say that root does not hold the images, and what would help."""
    hint = ""
    if not root.is_dir():
        what = f"data folder {root} does not exist"
    else:
        what = f"data folder {root} holds no {split} images of {name!r}"
        there = {entry.name for entry in root.iterdir() if entry.is_dir()}
        hint = _did_you_mean(name, {*KNOWN, *there} - {name})
    mend = "put one of these there"
    if name in KNOWN:
        mend += ", or name no data folder to download the images"
    return f"{what}{hint}; looked for {_layouts(root, name, split)}; {mend}"


def _download(name: str, split: Split, root: Path) -> None:
    """Fetch torchvision's files into root; each is there whole or not at all."""
    from torchvision import datasets  # takes as long to import as PyTorch

    known = KNOWN[name]
    timeout = socket.getdefaulttimeout()
    try:
        root.mkdir(parents=True, exist_ok=True)
        socket.setdefaulttimeout(_NETWORK_TIMEOUT)
        # A download that breaks off leaves nothing behind: files are moved only at the end.
        with tempfile.TemporaryDirectory(prefix=".partial-", dir=root) as partial:
            with contextlib.redirect_stdout(sys.stderr):  # older releases of torchvision print
                getattr(datasets, known.dataset)(partial, download=True)
            target = root / known.folder
            target.mkdir(parents=True, exist_ok=True)
            for path in sorted((Path(partial) / known.folder).iterdir()):
                if path.is_file() and path.suffix != ".gz":
                    path.replace(target / path.name)
    except (OSError, RuntimeError, EOFError, HTTPException, tarfile.TarError, zlib.error) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(
            f"could not download {name!r} into {root} ({reason}); without a network, name a data "
            f"folder with one of: {_layouts(Path('DIR'), name, split)}"
        ) from error
    finally:
        socket.setdefaulttimeout(timeout)
