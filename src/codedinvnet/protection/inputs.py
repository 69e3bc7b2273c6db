"""Read the queries that a backup learns from, and split them into training and test inputs."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import numpy as np
from PIL import Image

from codedinvnet.common.errors import UserError, one_line
from codedinvnet.common.files import content_digest
from codedinvnet.common.progress import Progress
from codedinvnet.common.user_code import import_user_module
from codedinvnet.models.base import DATATYPES, Signature, TensorSpec

IMAGES = "images"
"""Another name for the only input's array in an `.npz`."""
FEWEST = 200
"""With fewer inputs the intervals are too wide to say anything."""
SHARES = {"validation": (0.10, 2000), "calibration": (0.15, 3000), "test": (0.15, 3000)}
"""Shares of the inputs that are held out, and the most inputs of each."""
STREAM = 29
"""Part of the split's seed, so that it differs from `default_rng(0).permutation`, which may have
split the same inputs for the model's own training."""
CHANNELS = (1, 3)


def is_image(spec: TensorSpec) -> bool:
    """Return whether an input looks like an image, (C, H, W) or (H, W, C)."""
    return len(spec.shape) == 3 and (spec.shape[0] in CHANNELS or spec.shape[2] in CHANNELS)


def layout(spec: TensorSpec) -> tuple[int, bool]:
    """Return an image input's channels, and whether they come last."""
    last = spec.shape[0] not in CHANNELS
    return spec.shape[2 if last else 0], last


def image_size(spec: TensorSpec) -> tuple[int, int]:
    """Return an image input's height and width."""
    height, width = spec.shape[:2] if layout(spec)[1] else spec.shape[1:]
    return height, width


@dataclass(frozen=True)
class Inputs:
    """Queries in memory.

    Attributes:
        arrays: name -> (N, *shape), in the model's order of inputs; images may be kept as bytes.
        specs: the model's inputs.
    """

    arrays: Mapping[str, np.ndarray]
    specs: tuple[TensorSpec, ...]

    def __len__(self) -> int:
        return len(self.arrays[self.specs[0].name])

    def batch(self, rows: np.ndarray) -> dict[str, np.ndarray]:
        """Return queries as the model takes them; bytes become floats in 0..1 for a float model."""
        found = {}
        for spec in self.specs:
            array, dtype = self.arrays[spec.name][rows], DATATYPES[spec.datatype]
            if array.dtype == np.uint8 and dtype.kind == "f":
                array = array.astype(np.float32) / np.float32(255)
            found[spec.name] = array.astype(dtype, copy=False)
        return found

    def distinct(self) -> Inputs:
        """Drop repetitions, so that no test input was trained on."""
        queries = zip(*self.arrays.values(), strict=True)
        digests = [content_digest(b"".join(a.tobytes() for a in query)) for query in queries]
        rows = np.sort(np.unique(digests, return_index=True)[1])
        arrays = {name: array[rows] for name, array in self.arrays.items()}
        return Inputs(arrays, self.specs)

    @cached_property
    def digest(self) -> str:
        """A short digest of all queries."""
        digest = hashlib.sha256(repr(self.specs).encode())
        for array in self.arrays.values():
            digest.update(array.tobytes())
        return digest.hexdigest()[:16]


class Split(NamedTuple):
    """Disjoint rows of the inputs, ascending."""

    train: np.ndarray
    validation: np.ndarray
    calibration: np.ndarray
    test: np.ndarray


def split(count: int, seed: int) -> Split:
    """Draw a random split of so many inputs; UserError if they are too few."""
    if count < FEWEST:
        raise UserError(f"--inputs: found {count} different inputs; at least {FEWEST} are needed")
    order = np.random.default_rng((seed, STREAM)).permutation(count)
    sizes = [min(most, round(share * count)) for share, most in SHARES.values()]
    *parts, train = np.split(order, np.cumsum(sizes))
    validation, calibration, test = (np.sort(part) for part in parts)
    return Split(np.sort(train), validation, calibration, test)


Given: TypeAlias = "Path | np.ndarray | Mapping[str, np.ndarray]"
"""Inputs as users have them: a file or a folder, the only input's array, or arrays by name."""


def read_inputs(given: Given, signature: Signature, preprocess: str = "") -> Inputs:
    """Read a folder of images, `.npz`, `.npy`, or arrays.

    Args:
        given: where they are, or the arrays.
        signature: the model's.
        preprocess: `FILE.py:FUNCTION`, which makes one query of a Pillow image; "" resizes images
            to the model's size.

    Raises:
        UserError: if the model doesn't take them.
    """
    specs = signature.inputs
    if isinstance(given, Path) and given.is_dir():
        if len(specs) > 1:
            raise UserError("--inputs: a folder of images is for models with one input: use .npz")
        return Inputs({specs[0].name: _read_images(given, specs[0], preprocess)}, specs)
    if preprocess:
        raise UserError("--preprocess: makes queries of images: --inputs must be a folder of them")
    loaded: Any = given
    where = "the array" if isinstance(given, np.ndarray) else "the dict"
    try:
        if isinstance(given, Path):
            loaded, where = np.load(given, allow_pickle=False), str(given)
        found = {specs[0].name: loaded} if isinstance(loaded, np.ndarray) else dict(loaded)
    except Exception as error:  # NumPy raises many kinds for damaged files
        raise UserError(
            f"--inputs: cannot read {where} as a folder of images, .npz or .npy: {one_line(error)}"
        ) from error
    if len(specs) == 1 and (IMAGES in found or len(found) == 1):
        found.setdefault(specs[0].name, found.get(IMAGES, next(iter(found.values()))))
    if missing := [spec.name for spec in specs if spec.name not in found]:
        raise UserError(
            f"--inputs: {where} lacks an array for the model's {missing[0]!r}; it has those of "
            f"{', '.join(found)}"
        )
    arrays = {s.name: _fitted(found[s.name], s, f"{where}: {s.name!r}") for s in specs}
    counts = {name: len(array) for name, array in arrays.items()}
    if len(set(counts.values())) > 1:
        raise UserError(f"--inputs: {where} has different numbers of queries: {counts}")
    return Inputs(arrays, specs)


def _read_images(folder: Path, spec: TensorSpec, preprocess: str) -> np.ndarray:
    """Return the images in a folder and below it, sorted by path, as queries.

    The user's function makes a query of each; without one they are resized and kept as bytes.
    """
    function = _user_function(preprocess) if preprocess else None
    if function is None and not is_image(spec):
        raise UserError(f"--inputs: the model takes {spec.shape}, not an image: give --preprocess")
    known = Image.registered_extensions()
    paths = [path for path in sorted(folder.rglob("*")) if path.suffix.lower() in known]
    if not paths:
        raise UserError(f"--inputs: {folder} has no images that Pillow can read")
    found = np.empty((len(paths), *spec.shape), DATATYPES[spec.datatype] if function else np.uint8)
    for row, path in enumerate(Progress(paths, desc="images", unit="image", leave=False)):
        try:
            with Image.open(path) as image:
                query = np.asarray(function(image)) if function else _resized(image, spec)
        except Exception as error:  # of Pillow, or the user's function
            option = f"--preprocess {preprocess}" if function else "--inputs"
            kind = type(error).__name__
            raise UserError(f"{option}: {path}: {kind}: {one_line(error)}") from error
        found[row] = _converted(query[None], spec, str(path))[0] if function else query
    return found


def _resized(image: Image.Image, spec: TensorSpec) -> np.ndarray:
    """Return an image's bytes in the model's size and layout."""
    if image.mode[0] in "IF":  # with 16 or 32 bits a channel
        raise ValueError(f"its mode is {image.mode}, not 8 bits a channel: give --preprocess")
    channels, last = layout(spec)
    height, width = image_size(spec)
    image = image.convert("L" if channels == 1 else "RGB")
    image = image.resize((width, height), Image.Resampling.BILINEAR)
    array = np.asarray(image).reshape(height, width, channels)
    return array if last else array.transpose(2, 0, 1)


def _fitted(array: np.ndarray, spec: TensorSpec, where: str) -> np.ndarray:
    """Return an array in the model's shape; images of bytes may have their channels last."""
    if array.dtype == np.uint8 and array.ndim in (3, 4) and is_image(spec):
        channels, last = layout(spec)
        if array.ndim == 3 and channels == 1:
            array = array[..., None]
        if array.ndim == 4 and array.shape[1:] != spec.shape and not last:
            array = array.transpose(0, 3, 1, 2)
        if array.shape[1:] == spec.shape:
            return np.ascontiguousarray(array)
    return _converted(array, spec, where)


def _converted(array: np.ndarray, spec: TensorSpec, where: str) -> np.ndarray:
    """Convert queries to a model's datatype."""
    if array.ndim < 1 or array.shape[1:] != spec.shape:
        shape = array.shape[1:]
        raise UserError(f"--inputs: {where} has queries of shape {shape}, not {spec.shape}")
    if not np.can_cast(array.dtype, DATATYPES[spec.datatype], "same_kind"):
        raise UserError(f"--inputs: {where} is {array.dtype}, not {spec.datatype}")
    return np.asarray(array, DATATYPES[spec.datatype], order="C")


def _user_function(name: str) -> Any:
    """Return the function that --preprocess names, FILE.py:FUNCTION or package.module:function."""
    place, _, attribute = name.rpartition(":")
    found = getattr(import_user_module(place, f"--preprocess {name}"), attribute, None)
    if not callable(found):
        raise UserError(f"--preprocess {name}: {place} has no function {attribute}")
    return found
