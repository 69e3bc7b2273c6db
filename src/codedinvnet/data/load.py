"""Opening image sets by name: from files, by a download, or the samples that ship."""

from __future__ import annotations

import contextlib
import os
import re
import sys
import warnings
import zipfile
import zlib
from collections.abc import Iterable
from dataclasses import dataclass
from http.client import HTTPException
from importlib import resources
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from numpy.typing import NDArray

from codedinvnet.common.errors import UserError, nearest
from codedinvnet.data.sources import ImageSet, ImageSource, Split

_DAMAGED = (ValueError, OSError, EOFError, RuntimeError, zipfile.BadZipFile, zlib.error)
"""What numpy and zipfile raise on a damaged .npz file."""
_MOST_CLASSES = 100_000
"""Labels above this are a mistake."""
SAMPLES = ("mnist", "fashion")


@dataclass(frozen=True)
class Known:
    """What is known of an image set by its name."""

    classes: tuple[str, ...]
    dataset: str  # class in torchvision.datasets
    folder: str  # where torchvision puts its files, below its root


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
    "fashion": Known(_CLOTHES, "FashionMNIST", "FashionMNIST/raw"),
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
) -> ImageSource:
    """Find and open an image set.

    These are looked for in `data_dir`, in this order: `<name>/train.npz` (or `test.npz`) with
    arrays `images` (N, H, W) or (N, H, W, C) uint8 and `labels` (N,), and if wanted `classes`,
    the names; and torchvision's files, if the name is mnist, fashion or cifar10.

    Args:
        name: mnist, fashion, cifar10, or that of your own set.
        split: which of its two parts.
        data_dir: the only folder to look in; None: the cache folder, into which mnist, fashion
            and cifar10 are downloaded.
        download: download into `data_dir` what is not there.

    Raises:
        UserError: if nothing is found, a file is damaged, or a download fails.
    """
    if not re.fullmatch(r"\w[\w.-]*", name):
        raise UserError(f"image set {name!r}: a name has only letters, digits, '.', '_' and '-'")
    if split not in ("train", "test"):
        raise UserError(f"split {split!r} is neither 'train' nor 'test'")
    root = cache_dir() if data_dir is None else Path(data_dir)
    known = KNOWN.get(name)
    path = root / name / f"{split}.npz"
    if path.is_file():
        with path.open("rb") as stream:
            return read_npz(stream, name, str(path), known.classes if known else ())
    if known and (root / known.folder).is_dir():
        return _torchvision(name, root, split, download=False)
    if known and (download or data_dir is None):
        return _torchvision(name, root, split, download=True)
    raise UserError(_nothing_found(root, name, split))


def read_npz(stream: IO[bytes], name: str, source: str, known: tuple[str, ...] = ()) -> ImageSet:
    """Read images (N, H, W) or (N, H, W, C), labels (N,), and maybe classes.

    Args:
        stream: the file.
        name: the image set's name.
        source: the file's name, for messages.
        known: the classes, if the file does not name them; (): numbers.
    """
    try:
        archive = np.load(stream, allow_pickle=False)  # without pickle a file cannot run code
    except _DAMAGED as error:
        raise UserError(f"{source}: not a whole .npz file: {error}") from error
    if not isinstance(archive, np.lib.npyio.NpzFile):
        raise UserError(f"{source}: not an .npz file of named arrays")

    def array(key: str) -> NDArray[Any]:
        if key not in archive.files:
            hint, there = _did_you_mean(key, archive.files), ", ".join(archive.files) or "nothing"
            raise UserError(f"{source}: array {key!r} is missing{hint}; it holds {there}")
        try:
            found: NDArray[Any] = archive[key]
        except _DAMAGED as error:
            raise UserError(f"{source}: array {key!r} is unreadable: {error}") from error
        return found

    with archive:
        images, labels = array("images"), array("labels")
        classes = array("classes") if "classes" in archive.files else None
    highest = int(labels.max(initial=0)) if labels.dtype.kind in "iu" else 0
    wrong = {
        f"'images' is {images.dtype}, not uint8 (0 to 255)": images.dtype != np.uint8,
        f"'images' has shape {images.shape}, not (N, H, W) or (N, H, W, C) with 1 to 4 channels": (
            images.ndim != 3 and not (images.ndim == 4 and 1 <= images.shape[3] <= 4)
        ),
        f"'labels' is {labels.dtype} of shape {labels.shape}, not one row of whole numbers": (
            labels.dtype.kind not in "iu" or labels.ndim != 1
        ),
        "'classes' must be one row of strings": (
            classes is not None and (classes.dtype.kind != "U" or classes.ndim != 1)
        ),
        f"'labels' holds {highest}; labels are numbered from 0": highest >= _MOST_CLASSES,
    }
    for told, is_so in wrong.items():
        if is_so:
            raise UserError(f"{source}: array {told}")
    names = known if classes is None else tuple(map(str, classes))
    pixels = torch.from_numpy(images[..., None] if images.ndim == 3 else images)
    return ImageSet(
        name=name,
        classes=names or tuple(map(str, range(highest + 1))),
        images=pixels.permute(0, 3, 1, 2).contiguous(),
        labels=torch.from_numpy(labels.astype(np.int64)),
        source=source,
    )


def _torchvision(name: str, root: Path, split: Split, download: bool) -> ImageSet:
    """Read what torchvision keeps below root; CIFAR-10's md5 is checked before it is unpickled."""
    from torchvision import datasets  # takes as long to import as PyTorch

    known = KNOWN[name]
    place = root / known.folder
    try:
        with contextlib.redirect_stdout(sys.stderr), warnings.catch_warnings():
            # CIFAR-10's batches were pickled by an old numpy; a new one warns of that.
            warnings.simplefilter("ignore", np.exceptions.VisibleDeprecationWarning)
            made = getattr(datasets, known.dataset)
            found = made(root, train=split == "train", download=download)
    except (OSError, RuntimeError, ValueError, AssertionError, EOFError, HTTPException) as error:
        reason = " ".join(str(error).split())
        if download:
            told = f"could not download {name!r} into {root}: {reason}"
            raise UserError(f"{told}; without a network, name a data folder") from error
        told = f"{place}: a file is missing or damaged ({reason})"
        raise UserError(f"{told}; delete the folder and fetch it again") from error
    pixels = torch.as_tensor(found.data)
    pixels = pixels[:, None] if pixels.ndim == 3 else pixels.permute(0, 3, 1, 2).contiguous()
    labels = torch.as_tensor(found.targets, dtype=torch.int64)
    return ImageSet(name, known.classes, pixels, labels, str(place))


def sample_images(name: str) -> ImageSet:
    """Open the 1,000 test images of mnist or fashion that ship in the package.

    Raises:
        UserError: if no images of that name ship.
    """
    if name not in SAMPLES:
        raise UserError(
            f"no sample images of {name!r} ship{_did_you_mean(name, SAMPLES)}; "
            f"these do: {', '.join(SAMPLES)}"
        )
    label = f"samples/{name}.npz"
    with resources.files("codedinvnet.data").joinpath(label).open("rb") as stream:
        return read_npz(stream, name, f"codedinvnet/data/{label}", KNOWN[name].classes)


def _did_you_mean(name: str, options: Iterable[str]) -> str:
    near = nearest(name, options)
    return f" (did you mean {near!r}?)" if near is not None else ""


def _nothing_found(root: Path, name: str, split: Split) -> str:
    """Say that root does not hold the images, and what would help."""
    looked = [str(root / name / f"{split}.npz")]
    if name in KNOWN:
        looked.append(f"{root / KNOWN[name].folder}{os.sep} (torchvision's files)")
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
    return f"{what}{hint}; looked for {', '.join(looked)}; {mend}"
