"""Image sets: where they are found, how they are read, and how they are split and grouped.

Images stay as they were stored, uint8 in 0 to 255; the network pads and scales them.
"""

from __future__ import annotations

import difflib
import gzip
import math
import os
import re
import shutil
import socket
import struct
import tarfile
import tempfile
import time
import warnings
import zipfile
import zlib
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from http.client import HTTPException
from importlib import resources
from pathlib import Path
from typing import IO, Any, Literal, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torchvision import datasets
from torchvision.transforms import functional as transforms

from codedinvnet.errors import UserError

Split = Literal["train", "test"]

DEBIAN_FASHION = Path("/usr/share/datasets/fashion-mnist")  # package dataset-fashion-mnist
SAMPLES = ("mnist", "fashion")

# What numpy and zipfile raise on a damaged .npz file.
_DAMAGED = (ValueError, OSError, EOFError, RuntimeError, zipfile.BadZipFile, zlib.error)
_MOST_CLASSES = 100_000  # labels above this are a mistake, not classes
_NETWORK_TIMEOUT = 30.0  # seconds without an answer; urllib would otherwise wait for ever
_STALE_SECONDS = 24 * 3600.0


class ImageSource(Protocol):
    """Labelled images of one size, read by index."""

    @property
    def name(self) -> str:
        """The image set's name."""

    @property
    def classes(self) -> tuple[str, ...]:
        """Class names; label i is `classes[i]`."""

    @property
    def shape(self) -> tuple[int, int, int]:
        """Size of every image, (channels, height, width)."""

    @property
    def source(self) -> str:
        """Where the images were read, kept with results as provenance."""

    def __len__(self) -> int:
        """Count the images."""

    def batch(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        """Read some images.

        Args:
            indices: (B,) int64, each in 0 to len - 1.

        Returns:
            Images (B, C, H, W) uint8 in 0 to 255, and labels (B,) int64.
        """


@dataclass(frozen=True, eq=False)
class ImageSet:
    """An image set held in memory.

    Attributes:
        name: The image set's name.
        classes: Class names.
        images: (N, C, H, W) uint8 in 0 to 255.
        labels: (N,) int64, each in 0 to len(classes) - 1.
        source: Where the images were read; named in error messages.

    Raises:
        UserError: If the tensors are not as described above, or there are no images.
    """

    name: str
    classes: tuple[str, ...]
    images: Tensor
    labels: Tensor
    source: str

    def __post_init__(self) -> None:
        """Check what the class promises."""
        images, labels = self.images, self.labels
        if images.dtype != torch.uint8:
            raise UserError(f"{self.source}: images are {images.dtype}, not uint8 (0 to 255)")
        if images.ndim != 4:
            raise UserError(f"{self.source}: images have {images.ndim} dimensions, not 4 (N,C,H,W)")
        if images.numel() == 0:
            raise UserError(f"{self.source}: images is empty, shape {tuple(images.shape)}")
        if labels.dtype != torch.int64 or labels.ndim != 1:
            raise UserError(f"{self.source}: labels must be one row of int64")
        if len(labels) != len(images):
            raise UserError(f"{self.source}: {len(images)} images but {len(labels)} labels")
        low, high = int(labels.min()), int(labels.max())
        if low < 0 or high >= len(self.classes):
            raise UserError(
                f"{self.source}: labels run from {low} to {high}, outside the "
                f"{len(self.classes)} classes of {self.name!r} (0 to {len(self.classes) - 1})"
            )

    @property
    def shape(self) -> tuple[int, int, int]:
        """Size of every image, (channels, height, width)."""
        _, channels, height, width = self.images.shape
        return channels, height, width

    def __len__(self) -> int:
        """Count the images."""
        return len(self.images)

    def batch(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        """Read some images; see `ImageSource.batch`."""
        return self.images[indices], self.labels[indices]


class ImageFolder:
    """Images in one folder for each class, decoded when they are asked for (ImageNet's layout).

    Each is converted to RGB, resized so that its shorter side is image_size * 256 / 224, and
    cropped to the centre.

    Args:
        name: The image set's name.
        folder: Holds one folder of images for each class.
        image_size: Height and width of what `batch` returns, in pixels.
        threads: How many images are decoded at the same time.

    Raises:
        UserError: If there are no class folders, one has no images, or image_size is below 1.
    """

    def __init__(self, name: str, folder: Path, image_size: int = 224, threads: int = 4) -> None:
        """List the files; none is decoded yet."""
        if image_size < 1:
            raise UserError(f"image size {image_size} must be at least 1 pixel")
        try:
            found = datasets.ImageFolder(folder)
        except OSError as error:
            raise UserError(f"{folder}: not an image folder: {error}") from error
        self.name = name
        self.classes: tuple[str, ...] = tuple(found.classes)
        self.shape: tuple[int, int, int] = (3, image_size, image_size)
        self.source = str(folder)
        self._paths: list[str] = [path for path, _ in found.samples]
        self._labels = torch.tensor(found.targets, dtype=torch.int64)
        self._threads = threads

    def __len__(self) -> int:
        """Count the images."""
        return len(self._paths)

    def batch(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        """Read some images; see `ImageSource.batch`.

        Raises:
            UserError: If an image cannot be decoded; it names the file.
        """
        images = torch.empty((len(indices), *self.shape), dtype=torch.uint8)
        paths = [self._paths[index] for index in indices.tolist()]
        with ThreadPoolExecutor(self._threads) as pool:
            for row, image in enumerate(pool.map(self._decode, paths)):
                images[row] = image
        return images, self._labels[indices]

    def _decode(self, path: str) -> Tensor:
        size = self.shape[1]
        try:
            image = datasets.folder.pil_loader(path)
            image = transforms.resize(image, round(size * 256 / 224))
            pixels: Tensor = transforms.pil_to_tensor(transforms.center_crop(image, [size, size]))
        except Exception as error:  # decoders raise all sorts of things on a damaged file
            raise UserError(f"{path}: unreadable image: {error}") from error
        return pixels


@dataclass(frozen=True)
class _Known:
    """What is known of an image set by its name."""

    classes: tuple[str, ...]
    dataset: str  # class in torchvision.datasets
    folder: str  # where torchvision puts its files, below its root
    aliases: tuple[str, ...] = ()


_KNOWN = {
    "mnist": _Known(tuple("0123456789"), "MNIST", "MNIST/raw"),
    "fashion": _Known(
        (
            "T-shirt/top",
            "Trouser",
            "Pullover",
            "Dress",
            "Coat",
            "Sandal",
            "Shirt",
            "Sneaker",
            "Bag",
            "Ankle boot",
        ),
        "FashionMNIST",
        "FashionMNIST/raw",
        aliases=("fashion-mnist",),
    ),
    "cifar10": _Known(
        (
            "airplane",
            "automobile",
            "bird",
            "cat",
            "deer",
            "dog",
            "frog",
            "horse",
            "ship",
            "truck",
        ),
        "CIFAR10",
        "cifar-10-batches-py",
    ),
}


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
    `<name>/train/<class>/` (or `val` or `test`). For imagenet, `data_dir` may itself be the
    folder that holds `train` and `val`.

    Without `data_dir`, they are looked for in the cache folder, then where Debian installs
    Fashion-MNIST, and then they are downloaded into the cache folder.

    Args:
        name: mnist, fashion (or fashion-mnist), cifar10, imagenet, or that of your own set.
        split: Which of its two parts.
        data_dir: The only folder to look in.
        download: Download into `data_dir` what is not there.
        image_size: Height and width in pixels to which images from image folders are brought,
            224 unless told; other images keep their own size.

    Returns:
        The images; greyscale ones have one channel.

    Raises:
        UserError: If nothing is found, a file is damaged or not as described, or a download
            fails.
    """
    if not re.fullmatch(r"\w[\w.-]*", name):
        raise UserError(f"image set {name!r}: a name has only letters, digits, '.', '_' and '-'")
    if split not in ("train", "test"):
        raise UserError(f"split {split!r} is neither 'train' nor 'test'")
    name = _canonical(name)
    root = _cache_dir() if data_dir is None else data_dir
    found = _look_in(root, name, split, image_size)
    if found is not None:
        return found
    if data_dir is not None and not download:
        raise UserError(_nothing_found(root, name, split))
    if data_dir is None and name == "fashion" and DEBIAN_FASHION.is_dir():
        found = _read_idx_pair(DEBIAN_FASHION, name, split)
        if found is not None:
            return found
    if name not in _KNOWN:
        raise UserError(
            f"image set {name!r} cannot be downloaded{_did_you_mean(name, _KNOWN)}; these can: "
            f"{', '.join(_KNOWN)}; for another, pass --data-dir DIR with one of: "
            f"{_layouts(Path('DIR'), name, split)}"
        )
    _download(name, split, root)
    found = _look_in(root, name, split, image_size)
    if found is None:
        raise UserError(_nothing_found(root, name, split))
    return found


def sample_images(name: str) -> ImageSet:
    """Open the 1,000 test images that ship in the package.

    Args:
        name: mnist or fashion.

    Returns:
        The images, (1000, 1, 28, 28), with their labels.

    Raises:
        UserError: If no images of that name ship.
    """
    canonical = _canonical(name)
    if canonical not in SAMPLES:
        raise UserError(
            f"no sample images of {name!r} ship{_did_you_mean(name, SAMPLES)}; "
            f"these do: {', '.join(SAMPLES)}"
        )
    label = f"samples/{canonical}.npz"
    with resources.files("codedinvnet").joinpath(label).open("rb") as stream:
        return _read_npz(stream, canonical, f"codedinvnet/{label}")


def split_indices(count: int, validation: int, seed: int) -> tuple[Tensor, Tensor]:
    """Set some images of a training split aside for validation; the same ones for a same seed.

    Args:
        count: How many images there are.
        validation: How many to set aside.
        seed: Decides which.

    Returns:
        Indices (count - validation,) to train on and (validation,) to validate on, int64, sorted.

    Raises:
        UserError: If validation is negative, or leaves nothing to train on.
    """
    if not 0 <= validation < count:
        raise UserError(
            f"cannot set {validation} of {count} images aside for validation: "
            f"it must be at least 0 and less than {count}"
        )
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    return order[validation:].sort().values, order[:validation].sort().values


@dataclass(frozen=True, eq=False)
class Groups:
    """Coding groups of images.

    Attributes:
        members: (G, k) int64, indices of images; no group holds an image twice.
        counted: (G, k) bool; False where an image only fills a group up, and its answer must
            not count because it is counted in another group.
    """

    members: Tensor
    counted: Tensor


def random_groups(count: int, k: int, generator: torch.Generator) -> Groups:
    """Put images in random coding groups so that each is counted exactly once.

    When k does not divide count, other random images fill the last group up; these are not
    counted.

    Args:
        count: How many images there are.
        k: Images in a group.
        generator: Source of randomness, on the CPU.

    Returns:
        ceil(count / k) groups.

    Raises:
        UserError: If k is below 2 or above count.
    """
    if not 2 <= k <= count:
        raise UserError(f"groups of k={k} cannot be made of {count} images: k is 2 to {count}")
    order = torch.randperm(count, generator=generator)
    missing = -count % k
    whole = count - count % k  # images in whole groups; only these may fill the last one up
    filling = order[torch.randperm(whole, generator=generator)[:missing]]
    counted = torch.ones(count + missing, dtype=torch.bool)
    counted[count:] = False
    return Groups(torch.cat([order, filling]).reshape(-1, k), counted.reshape(-1, k))


def _canonical(name: str) -> str:
    return next((known for known, facts in _KNOWN.items() if name in facts.aliases), name)


def _cache_dir() -> Path:
    if own := os.environ.get("CODEDINVNET_CACHE"):
        return Path(own)
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "codedinvnet"


def _spellings(name: str) -> tuple[str, ...]:
    return (name, *_KNOWN[name].aliases) if name in _KNOWN else (name,)


def _folder_splits(split: Split) -> tuple[str, ...]:
    return ("train",) if split == "train" else ("val", "test")


def _look_in(root: Path, name: str, split: Split, image_size: int | None) -> ImageSource | None:
    """Try every layout below root; None if none of them is there."""
    for spelling in _spellings(name):
        path = root / spelling / f"{split}.npz"
        if path.is_file():
            try:
                with path.open("rb") as stream:
                    return _read_npz(stream, name, str(path))
            except OSError as error:
                raise UserError(f"{path}: unreadable: {error}") from error
    known = _KNOWN.get(name)
    if known is not None and (root / known.folder).is_dir():
        if known.dataset == "CIFAR10":
            return _read_cifar10(root, split)
        pair = _read_idx_pair(root / known.folder, name, split)
        if pair is not None:
            return pair
    parents = [root / spelling for spelling in _spellings(name)]
    if name == "imagenet":
        parents.append(root)
    for parent in parents:
        for folder in _folder_splits(split):
            if (parent / folder).is_dir():
                size = 224 if image_size is None else image_size
                return ImageFolder(name, parent / folder, size)
    return None


def _layouts(root: Path, name: str, split: Split) -> str:
    known = _KNOWN.get(name)
    looked = [str(root / name / f"{split}.npz")]
    if known is not None:
        looked.append(f"{root / known.folder}{os.sep} (torchvision's files)")
    folders = " or ".join(_folder_splits(split))
    looked.append(f"{root / name}{os.sep} with {folders} and a folder of images for each class")
    return ", ".join(looked)


def _nothing_found(root: Path, name: str, split: Split) -> str:
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
        there -= {Path(known.folder).parts[0] for known in _KNOWN.values()}
        hint = _did_you_mean(name, {*_KNOWN, *there} - {name})
    mend = "put one of these there"
    if name in _KNOWN:
        mend += ", or leave --data-dir out to download the images"
    return f"{what}{hint}; looked for {_layouts(root, name, split)}; {mend}"


def _did_you_mean(name: str, options: Iterable[str]) -> str:
    by_lower = {option.lower(): option for option in sorted(options)}
    close = difflib.get_close_matches(name.lower(), by_lower, n=1)
    return f" (did you mean {by_lower[close[0]]!r}?)" if close else ""


def _read_npz(stream: IO[bytes], name: str, source: str) -> ImageSet:
    """Read images (N,H,W) or (N,H,W,C), labels (N,), and classes if it is there."""
    classes = None
    try:
        # Without pickle a file cannot run code.
        archive = np.load(stream, allow_pickle=False)
        if not isinstance(archive, np.lib.npyio.NpzFile):
            raise UserError(f"{source}: not an .npz file of named arrays")
        with archive:
            images = _npz_array(archive, "images", source)
            labels = _npz_array(archive, "labels", source)
            if "classes" in archive.files:
                classes = _npz_array(archive, "classes", source)
    except _DAMAGED as error:
        raise UserError(f"{source}: not a whole .npz file: {error}") from error

    if images.dtype != np.uint8:
        nan = " with NaN in it" if images.dtype.kind == "f" and np.isnan(images).any() else ""
        raise UserError(f"{source}: array 'images' is {images.dtype}{nan}, not uint8 (0 to 255)")
    if images.ndim not in (3, 4):
        raise UserError(f"{source}: array 'images' has shape {images.shape}, not N,H,W or N,H,W,C")
    if images.ndim == 4 and not 1 <= images.shape[3] <= 4:
        raise UserError(
            f"{source}: array 'images' has shape {images.shape}: its last dimension must be the "
            f"1 to 4 channels (N,H,W,C)"
        )
    if labels.dtype.kind not in "iu":
        raise UserError(f"{source}: array 'labels' is {labels.dtype}, not whole numbers")
    if labels.ndim != 1:
        raise UserError(f"{source}: array 'labels' has shape {labels.shape}, not one row")
    if images.ndim == 3:
        images = images[..., None]
    return ImageSet(
        name=name,
        classes=_class_names(name, labels, classes, source),
        images=torch.from_numpy(images).permute(0, 3, 1, 2).contiguous(),
        labels=torch.from_numpy(labels.astype(np.int64)),
        source=source,
    )


def _npz_array(archive: np.lib.npyio.NpzFile, key: str, source: str) -> NDArray[Any]:
    if key not in archive.files:
        there = ", ".join(archive.files) or "nothing"
        hint = _did_you_mean(key, archive.files)
        raise UserError(f"{source}: array {key!r} is missing{hint}; it holds {there}")
    try:
        array: NDArray[Any] = archive[key]
    except _DAMAGED as error:
        raise UserError(f"{source}: array {key!r} is unreadable: {error}") from error
    return array


def _class_names(
    name: str, labels: NDArray[Any], classes: NDArray[Any] | None, source: str
) -> tuple[str, ...]:
    if classes is not None:
        if classes.dtype.kind != "U" or classes.ndim != 1:
            raise UserError(f"{source}: array 'classes' must be one row of strings")
        return tuple(str(each) for each in classes)
    if name in _KNOWN:
        return _KNOWN[name].classes
    highest = int(labels.max(initial=0))
    if highest >= _MOST_CLASSES:
        raise UserError(f"{source}: array 'labels' holds {highest}; labels are numbered from 0")
    return tuple(str(label) for label in range(highest + 1))


def _read_idx_pair(folder: Path, name: str, split: Split) -> ImageSet | None:
    """Read MNIST's two files of a split, plain or .gz; None if neither is there."""
    prefix = "train" if split == "train" else "t10k"
    stems = (f"{prefix}-images-idx3-ubyte", f"{prefix}-labels-idx1-ubyte")
    paths = [
        next((p for p in (folder / stem, folder / f"{stem}.gz") if p.is_file()), None)
        for stem in stems
    ]
    if paths == [None, None]:
        return None
    for path, stem in zip(paths, stems, strict=True):
        if path is None:
            raise UserError(f"{folder / stem} is missing (or the same with .gz)")
    images, labels = (
        _read_idx(path, dimensions)
        for path, dimensions in zip(paths, (3, 1), strict=True)
        if path is not None
    )
    return ImageSet(
        name=name,
        classes=_KNOWN[name].classes,
        images=torch.from_numpy(images)[:, None],
        labels=torch.from_numpy(labels.astype(np.int64)),
        source=str(folder),
    )


def _read_idx(path: Path, dimensions: int) -> NDArray[np.uint8]:
    """Read an idx file of bytes: two zeros, type 8, rank, big-endian sizes, then the bytes."""
    content, whole = _read_bytes(path)
    header = 4 + 4 * dimensions
    if len(content) < header:
        raise UserError(f"{path}: {len(content)} bytes, too short for an idx header of {header}")
    magic = bytes((0, 0, 8, dimensions))
    if content[:4] != magic:
        raise UserError(
            f"{path}: not an idx file of {dimensions}-dimensional bytes: it starts with "
            f"{content[:4].hex()}, not {magic.hex()}"
        )
    shape = struct.unpack(f">{dimensions}I", content[4:header])
    expected = header + math.prod(shape)
    if len(content) != expected or not whole:
        raise UserError(
            f"{path}: damaged or cut short: its header asks for {expected} bytes in all, "
            f"{len(content)} were found; delete it and fetch it again"
        )
    return np.frombuffer(content, np.uint8, offset=header).reshape(shape)


def _read_bytes(path: Path) -> tuple[bytearray, bool]:
    """Read a plain or .gz file: its bytes, and whether a .gz reached its end."""
    content = bytearray()
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as stream:
            while chunk := stream.read1(1 << 20):
                content += chunk
    except EOFError:
        return content, False
    except (OSError, zlib.error) as error:
        raise UserError(f"{path}: unreadable: {error}") from error
    return content, True


def _read_cifar10(root: Path, split: Split) -> ImageSet:
    folder = root / _KNOWN["cifar10"].folder
    try:
        with warnings.catch_warnings():
            # The batches were pickled by an old numpy; a new one warns of that.
            warnings.simplefilter("ignore", np.exceptions.VisibleDeprecationWarning)
            # Checks each file's md5 before it unpickles it.
            found = datasets.CIFAR10(root, train=split == "train", download=False)
    except (RuntimeError, OSError) as error:
        raise UserError(
            f"{folder}: a file of CIFAR-10 is missing or damaged (its md5 differs); "
            f"delete the folder and fetch it again"
        ) from error
    return ImageSet(
        name="cifar10",
        classes=_KNOWN["cifar10"].classes,
        images=torch.from_numpy(found.data).permute(0, 3, 1, 2).contiguous(),
        labels=torch.tensor(found.targets, dtype=torch.int64),
        source=str(folder),
    )


def _download(name: str, split: Split, root: Path) -> None:
    """Fetch torchvision's files into root; each is there whole or not at all."""
    known = _KNOWN[name]
    timeout = socket.getdefaulttimeout()
    try:
        root.mkdir(parents=True, exist_ok=True)
        _remove_stale(root)
        socket.setdefaulttimeout(_NETWORK_TIMEOUT)
        # A download that breaks off leaves nothing behind: files are moved only at the end.
        with tempfile.TemporaryDirectory(prefix=".partial-", dir=root) as partial:
            getattr(datasets, known.dataset)(partial, download=True)
            _move_files(Path(partial) / known.folder, root / known.folder, skip=(".gz",))
    except (OSError, RuntimeError, EOFError, HTTPException, tarfile.TarError, zlib.error) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(
            f"could not download {name!r} into {root} ({reason}); without a network, pass "
            f"--data-dir DIR with one of: {_layouts(Path('DIR'), name, split)}"
        ) from error
    finally:
        socket.setdefaulttimeout(timeout)


def _remove_stale(root: Path) -> None:
    """Remove what a download left that was killed; a young one may still be running."""
    for partial in root.glob(".partial-*"):
        if time.time() - partial.stat().st_mtime > _STALE_SECONDS:
            shutil.rmtree(partial, ignore_errors=True)


def _move_files(source: Path, target: Path, skip: Sequence[str]) -> None:
    target.mkdir(parents=True, exist_ok=True)
    for path in sorted(source.iterdir()):
        if path.is_file() and path.suffix not in skip:
            path.replace(target / path.name)
