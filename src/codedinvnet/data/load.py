"""Opening image sets: from files, by a download, or the samples that ship."""

from __future__ import annotations

import re
from importlib import resources
from pathlib import Path

from codedinvnet.data.download import download_images
from codedinvnet.data.finding import cache_dir, layouts, look_in, nothing_found
from codedinvnet.data.formats import read_idx_pair, read_npz
from codedinvnet.data.names import KNOWN, canonical, did_you_mean
from codedinvnet.data.sources import ImageSet, ImageSource, Split
from codedinvnet.errors import UserError

DEBIAN_FASHION = Path("/usr/share/datasets/fashion-mnist")  # package dataset-fashion-mnist
SAMPLES = ("mnist", "fashion")


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
    name = canonical(name)
    root = cache_dir() if data_dir is None else data_dir
    found = look_in(root, name, split, image_size)
    if found is not None:
        return found
    if data_dir is not None and (not download or name not in KNOWN):
        raise UserError(nothing_found(root, name, split))
    if data_dir is None and name == "fashion" and DEBIAN_FASHION.is_dir():
        found = read_idx_pair(DEBIAN_FASHION, name, split)
        if found is not None:
            return found
    if name not in KNOWN:
        raise UserError(
            f"image set {name!r} cannot be downloaded{did_you_mean(name, KNOWN)}; these can: "
            f"{', '.join(KNOWN)}; for another, pass --data-dir DIR with one of: "
            f"{layouts(Path('DIR'), name, split)}"
        )
    download_images(name, split, root)
    found = look_in(root, name, split, image_size)
    if found is None:
        raise UserError(nothing_found(root, name, split))
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
    known = canonical(name)
    if known not in SAMPLES:
        raise UserError(
            f"no sample images of {name!r} ship{did_you_mean(name, SAMPLES)}; "
            f"these do: {', '.join(SAMPLES)}"
        )
    label = f"samples/{known}.npz"
    with resources.files("codedinvnet").joinpath(label).open("rb") as stream:
        return read_npz(stream, known, f"codedinvnet/{label}")
