"""Images as a model takes them: sizes, scales and layouts, or a user's own function."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

from codedinvnet.errors import UserError, one_line
from codedinvnet.models.base import DATATYPES, TensorSpec
from codedinvnet.progress import Progress
from codedinvnet.user_code import user_module

if TYPE_CHECKING:  # where it is needed it is imported: `load` reads other inputs without
    from PIL import Image

Finish: TypeAlias = Callable[[np.ndarray], np.ndarray]
"""Makes a batch of the model's input of a batch that is kept."""
CHANNELS = (1, 3)
DEEP = ("I", "F")
"""How the names of Pillow's modes of more than a byte a channel begin: 16 or 32 bits."""
NO_IMAGES = ("BUFR", "GRIB", "HDF5", "MPEG", "PDF")
"""Formats whose names Pillow knows without reading them."""


@dataclass(frozen=True)
class Preprocessing:
    """How images become a model's input.

    Attributes:
        resize: pixels of the shorter side; None: images are brought to the model's size.
        crop: pixels of the square that is cut out of the middle; None: the model's size.
        scale: factor of pixels 0..255; None: 1/255, or 1 if the model takes integers.
        mean: subtracted after scaling, one number or one a channel; () for 0.
        std: divides after that; () for 1.
        function: the user's own, `package.module:function` or `FILE.py:function`, which makes one
            query of a Pillow image; the others do not count then.
    """

    resize: int | None = None
    crop: int | None = None
    scale: float | None = None
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()
    function: str = ""

    def finish(self, spec: TensorSpec, images: np.ndarray) -> Finish:
        """Return what makes the model's input of images in bytes; whole numbers are rounded.

        Raises:
            UserError: if there are neither one mean and std nor one a channel, a std is 0, or some
                of these images become numbers that the model's datatype does not have.
        """
        channels, last = layout(spec)
        floating = DATATYPES[spec.datatype].kind == "f"
        scale = self.scale if self.scale is not None else (1 / 255 if floating else 1.0)
        for option, values in (("--mean", self.mean), ("--std", self.std)):
            if len(values) not in (0, 1, channels):
                raise UserError(
                    f"{option}: give one number, or one for each of {channels} channels"
                )
        if 0 in self.std:
            raise UserError("--std: a channel cannot be divided by 0")
        shape = (-1,) if last else (-1, 1, 1)
        mean = np.array(self.mean or (0.0,), np.float32).reshape(shape)
        std = np.array(self.std or (1.0,), np.float32).reshape(shape)
        dtype = DATATYPES[spec.datatype]

        def scaled(pixels: np.ndarray) -> np.ndarray:
            found = (pixels.astype(np.float32) * np.float32(scale) - mean) / std
            return np.rint(found) if dtype.kind in "iu" else found

        if images.size:
            axes = (0, 1, 2) if last else (0, 2, 3)
            ends = [  # over the images first: numpy is 50 times as fast that way
                end(end(images, axis=0, keepdims=True), axis=axes, keepdims=True)
                for end in (np.min, np.max)
            ]
            where = f"--inputs: {spec.name!r}, made of images in bytes,"
            converted(scaled(np.concatenate(ends)), spec, where)
        return lambda pixels: scaled(pixels).astype(dtype)

    def size(self, spec: TensorSpec) -> tuple[int, int]:
        """Return the model's height and width.

        Raises:
            UserError: if the crop is of another size.
        """
        _, last = layout(spec)
        height, width = spec.shape[:2] if last else spec.shape[1:]
        if self.crop is not None and (self.crop, self.crop) != (height, width):
            raise UserError(f"--crop {self.crop}: the model takes {height}x{width} pixels")
        if self.resize is not None and self.resize < max(height, width):
            raise UserError(f"--resize {self.resize}: the model takes {height}x{width} pixels")
        return height, width

    def pixels(self, image: Image.Image, spec: TensorSpec) -> np.ndarray:
        """Return an image in bytes, in the model's size and layout.

        Raises:
            UserError: if it is smaller than what is cut out, or its pixels are no bytes.
        """
        from PIL import Image

        channels, last = layout(spec)
        height, width = self.size(spec)
        if image.mode.startswith(DEEP):
            raise UserError(
                f"its pixels are no bytes (Pillow's mode {image.mode}), and nobody knows their "
                "scale: --preprocess"
            )
        try:
            image = image.convert("L" if channels == 1 else "RGB")
        except ValueError as error:  # of LAB, for one
            raise UserError(f"{one_line(error)}: --preprocess") from error
        if self.resize is not None:
            factor = self.resize / min(image.size)
            new = (
                max(width, round(image.width * factor)),
                max(height, round(image.height * factor)),
            )
            image = image.resize(new, Image.Resampling.BILINEAR)
        elif self.crop is None:
            image = image.resize((width, height), Image.Resampling.BILINEAR)
        if image.width < width or image.height < height:
            raise UserError(
                f"it has {image.width}x{image.height} pixels, fewer than --crop: --resize"
            )
        left, top = (image.width - width) // 2, (image.height - height) // 2
        image = image.crop((left, top, left + width, top + height))
        array = np.asarray(image).reshape(height, width, channels)
        return array if last else array.transpose(2, 0, 1)


def is_image(spec: TensorSpec) -> bool:
    """Tell whether an input looks like an image, (C, H, W) or (H, W, C)."""
    return len(spec.shape) == 3 and (spec.shape[0] in CHANNELS or spec.shape[2] in CHANNELS)


def layout(spec: TensorSpec) -> tuple[int, bool]:
    """Return the channels of an image input, and whether their axis comes last.

    Raises:
        UserError: if the input is no image.
    """
    if not is_image(spec) or spec.datatype == "BYTES":
        raise UserError(
            f"--inputs: the model's input {spec.name!r} {spec.shape} is no image, (C, H, W) or "
            "(H, W, C): give .npz, .npy or .jsonl"
        )
    last = spec.shape[0] not in CHANNELS
    return spec.shape[2 if last else 0], last


def image_paths(folder: Path) -> list[Path]:
    """Return the images of a folder and the folders in it, sorted.

    Raises:
        UserError: if there is none.
    """
    from PIL import Image

    Image.init()
    paths = sorted(
        path
        for path in folder.rglob("*")
        if Image.EXTENSION.get(path.suffix.lower()) not in (None, *NO_IMAGES) and path.is_file()
    )
    if not paths:
        raise UserError(f"--inputs: {folder} has no image that Pillow reads")
    return paths


def read_images(paths: Sequence[Path], spec: TensorSpec, how: Preprocessing) -> np.ndarray:
    """Return images, (N, *shape), and show how far it is.

    Args:
        paths: the images.
        spec: the model's one input.
        how: the preprocessing. With a function of the user's own these are finished queries.

    Raises:
        UserError: if an image cannot be read, or its query is none that the model takes.
    """
    from PIL import Image

    own = user_function(how.function, "--preprocess") if how.function else None
    if own is None:
        how.size(spec)
    dtype = np.dtype(np.uint8) if own is None else DATATYPES[spec.datatype]
    found = np.empty((len(paths), *spec.shape), dtype)
    for row, path in enumerate(Progress(paths, desc="images", unit="image", leave=False)):
        try:
            with Image.open(path) as image:
                image.load()
        except Exception as error:  # Pillow has many for what is damaged
            raise UserError(f"--inputs: {path} cannot be read: {one_line(error)}") from error
        if own is None:
            try:
                found[row] = how.pixels(image, spec)
            except UserError as error:
                raise UserError(f"--inputs: {path}: {error}") from error
            continue
        try:
            query = np.asarray(own(image))
        except Exception as error:  # whatever the user's function raises
            raise UserError(
                f"--preprocess raised {type(error).__name__}: {one_line(error)}"
            ) from error
        if query.shape != spec.shape:
            raise UserError(
                f"--preprocess made {query.shape} of {path}, and the model takes {spec.shape}"
            )
        found[row] = taken(query, spec, f"--preprocess: what it made of {path}")
    return found


def taken(array: np.ndarray, spec: TensorSpec, where: str) -> np.ndarray:
    """Return numbers or texts in a model's datatype.

    Raises:
        UserError: if they are of another kind, or it has no such numbers; `where` names them.
    """
    dtype = DATATYPES[spec.datatype]
    kinds = {"f": "fiu", "i": "iu", "u": "iu", "b": "b"}.get(dtype.kind, "SUO")
    if array.dtype.kind not in kinds:
        raise UserError(f"{where} is {array.dtype}, not {spec.datatype}")
    if dtype.kind == "O":
        texts = [v if isinstance(v, bytes) else str(v).encode() for v in array.ravel().tolist()]
        return np.array(texts, object).reshape(array.shape)
    return converted(array, spec, where)


def converted(array: np.ndarray, spec: TensorSpec, where: str) -> np.ndarray:
    """Return numbers in a model's datatype.

    Raises:
        UserError: if it has no such numbers; `where` names them.
    """
    dtype = DATATYPES[spec.datatype]
    if dtype.kind in "iu" and array.size:
        bounds = np.iinfo(str(dtype))
        if not (bounds.min <= array.min() and array.max() <= bounds.max):  # NaN neither
            raise UserError(
                f"{where} has values from {array.min()} to {array.max()}, and {spec.datatype} "
                f"has those from {bounds.min} to {bounds.max}: convert them as clients do"
            )
    with np.errstate(over="ignore"):
        found = np.asarray(array, dtype, order="C")
    if dtype.kind == "f" and (np.isinf(found) & np.isfinite(array)).any():
        largest = np.finfo(str(dtype)).max
        raise UserError(
            f"{where} has values beyond {largest:.6g}, the largest of {spec.datatype}: "
            "convert them as clients do"
        )
    return found


def user_function(name: str, option: str) -> Callable[..., Any]:
    """Return a function of the user's, `package.module:function` or `FILE.py:function`.

    Raises:
        UserError: if there is none.
    """
    place, _, attribute = name.rpartition(":")
    try:
        function = getattr(user_module(place), attribute)
    except Exception as error:  # whatever the user's module raises
        raise UserError(f"{option} {name}: {type(error).__name__}: {one_line(error)}") from error
    if not callable(function):
        raise UserError(f"{option} {name} is no function")
    return function  # type: ignore[no-any-return]
