"""Read the queries that a backup learns from, and split them into training and test inputs."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from codedinvnet.common.errors import UserError, nearest, one_line
from codedinvnet.common.progress import Progress
from codedinvnet.common.user_code import user_module
from codedinvnet.models.base import DATATYPES, Signature, TensorSpec, scores_tensor

LABELS, IMAGES = "labels", "images"
"""Arrays of an `.npz`: the classes, and another name for the model's only input."""
FEWEST = 200
"""With fewer inputs the intervals are too wide to say anything."""
SHARES = {"validation": (0.10, 2500), "calibration": (0.15, 5000), "test": (0.15, 5000)}
"""Shares of the inputs that are held out, and the most inputs of each."""
STREAM = 29
"""Part of the split's seed, so that it differs from `default_rng(0).permutation`, which may have
split the same inputs for the model's own training."""
CHANNELS = (1, 3)
DEEP = ("I", "F")
"""First letters of Pillow's modes with 16 or 32 bits a channel."""


def is_image(spec: TensorSpec) -> bool:
    """Tell whether an input looks like an image, (C, H, W) or (H, W, C)."""
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
        labels: the right classes, (N,); None if they are unknown.
    """

    arrays: Mapping[str, np.ndarray]
    specs: tuple[TensorSpec, ...]
    labels: np.ndarray | None = None

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
        seen: dict[bytes, int] = {}
        for row in range(len(self)):
            seen.setdefault(self._row_digest(row), row)
        rows = np.array(list(seen.values()), np.intp)
        arrays = {name: array[rows] for name, array in self.arrays.items()}
        return Inputs(arrays, self.specs, None if self.labels is None else self.labels[rows])

    def digest(self) -> str:
        """Return a short digest of all queries."""
        whole = hashlib.sha256(repr([(s.name, s.datatype) for s in self.specs]).encode())
        for row in range(len(self)):
            whole.update(self._row_digest(row))
        return whole.hexdigest()[:16]

    def _row_digest(self, row: int) -> bytes:
        digest = hashlib.blake2b(digest_size=16)
        for array in self.arrays.values():
            digest.update(array[row].tobytes())
        return digest.digest()


class Split(NamedTuple):
    """Disjoint rows of the inputs, ascending."""

    train: np.ndarray
    validation: np.ndarray
    calibration: np.ndarray
    test: np.ndarray


def split(count: int, seed: int) -> Split:
    """Draw a random split of so many inputs.

    Raises:
        UserError: if they are too few.
    """
    if count < FEWEST:
        raise UserError(f"--inputs: found {count} different inputs; at least {FEWEST} are needed")
    order = np.random.default_rng((seed, STREAM)).permutation(count)
    sizes = [min(most, round(share * count)) for share, most in SHARES.values()]
    *parts, train = np.split(order, np.cumsum(sizes))
    validation, calibration, test = (np.sort(part) for part in parts)
    return Split(np.sort(train), validation, calibration, test)


def read_inputs(
    path: Path, signature: Signature, preprocess: str = "", labels: Path | None = None
) -> Inputs:
    """Read a folder of images, `.npz` or `.npy`.

    Args:
        path: where they are.
        signature: the model's.
        preprocess: `FILE.py:FUNCTION`, which makes one query of a Pillow image; "" resizes images
            to the model's size.
        labels: `.npy`, or text with one class a line; None: an `.npz` may have its own.

    Raises:
        UserError: if the model does not take them, or the labels do not fit.
    """
    specs = signature.inputs
    if not path.exists():
        raise UserError(f"--inputs: there is no {path}")
    if preprocess and len(specs) > 1:
        raise UserError("--preprocess: works for models with one image input only")
    function = user_function(preprocess, "--preprocess") if preprocess else None
    known, where = _read_labels(labels), f"--labels {labels}" if labels else f"--inputs {path}"
    if path.is_dir():
        if len(specs) > 1:
            raise UserError("--inputs: a folder of images fits models with one input: use .npz")
        paths = image_paths(path)
        arrays = {specs[0].name: _queries(opened(paths), len(paths), specs[0], function)}
    elif path.suffix in (".npz", ".npy"):
        found = _arrays(path, [spec.name for spec in specs])
        if all(spec.name != LABELS for spec in specs) and known is None:
            known = found.get(LABELS)
        arrays = {s.name: _fitted(found[s.name], s, f"{path}: {s.name!r}", function) for s in specs}
    else:
        raise UserError(f"--inputs: {path} is not a folder of images, .npz or .npy")
    counts = {name: len(array) for name, array in arrays.items()}
    if len(set(counts.values())) > 1:
        raise UserError(f"--inputs: {path} has different numbers of queries: {counts}")
    count = next(iter(counts.values()))
    return Inputs(
        arrays, specs, None if known is None else _checked(known, count, signature, where)
    )


def image_paths(folder: Path) -> list[Path]:
    """Return the images in a folder and below it, sorted.

    Raises:
        UserError: if there are none.
    """
    known = Image.registered_extensions()
    paths = [path for path in sorted(folder.rglob("*")) if path.suffix.lower() in known]
    if not paths:
        raise UserError(f"--inputs: {folder} has no images that Pillow can read")
    return paths


def opened(paths: Sequence[Path]) -> Iterable[Image.Image]:
    """Yield the images of files."""
    for path in Progress(paths, desc="images", unit="image", leave=False):
        try:
            with Image.open(path) as image:
                image.load()
        except Exception as error:  # Pillow raises many kinds for damaged files
            raise UserError(f"--inputs: cannot read {path}: {one_line(error)}") from error
        image.filename = str(path)
        yield image


def _queries(
    images: Iterable[Image.Image],
    count: int,
    spec: TensorSpec,
    function: Callable[..., Any] | None,
) -> np.ndarray:
    """Make queries of images: by the user's function, or resized and kept as bytes."""
    dtype = DATATYPES[spec.datatype] if function else np.dtype(np.uint8)
    found = np.empty((count, *spec.shape), dtype)
    for row, image in enumerate(images):
        where = getattr(image, "filename", f"image {row}")
        if function is None:
            found[row] = _resized(image, spec, where)
            continue
        try:
            query = np.asarray(function(image))
        except Exception as error:  # whatever the user's function raises
            kind = type(error).__name__
            raise UserError(f"--preprocess raised {kind}: {one_line(error)}") from error
        if query.shape != spec.shape:
            raise UserError(
                f"--preprocess returned shape {query.shape} for {where}; the model takes "
                f"{spec.shape}"
            )
        found[row] = taken(query, spec, f"--preprocess: its result for {where}")
    return found


def _resized(image: Image.Image, spec: TensorSpec, where: str) -> np.ndarray:
    """Return an image's bytes in the model's size and layout."""
    if not is_image(spec):
        raise UserError(f"--inputs: the model takes {spec.shape}, which is no image: --preprocess")
    channels, last = layout(spec)
    if image.mode.startswith(DEEP):
        raise UserError(
            f"--inputs: {where}: unsupported image mode {image.mode} (need 8-bit): --preprocess"
        )
    try:
        image = image.convert("L" if channels == 1 else "RGB")
    except ValueError as error:  # LAB, for example
        raise UserError(f"--inputs: {where}: {one_line(error)}: --preprocess") from error
    height, width = image_size(spec)
    image = image.resize((width, height), Image.Resampling.BILINEAR)
    array = np.asarray(image).reshape(height, width, channels)
    return array if last else array.transpose(2, 0, 1)


def _arrays(path: Path, names: list[str]) -> dict[str, np.ndarray]:
    try:
        loaded = np.load(path, allow_pickle=False)
        found = {names[0]: loaded} if isinstance(loaded, np.ndarray) else dict(loaded.items())
    except Exception as error:  # NumPy raises many kinds for damaged files
        raise UserError(f"--inputs: cannot read {path}: {one_line(error)}") from error
    if len(names) == 1 and names[0] not in found and IMAGES in found:
        found[names[0]] = found.pop(IMAGES)
    for name in names:
        if name not in found:
            near = nearest(name, found)
            hint = f"; did you mean to name {near!r} so?" if near else ""
            raise UserError(f"--inputs: {path} lacks an array for the model's {name!r}{hint}")
    return found


def _fitted(
    array: np.ndarray,
    spec: TensorSpec,
    where: str,
    function: Callable[..., Any] | None = None,
) -> np.ndarray:
    """Return an array in the model's shape."""
    pixels = array.dtype == np.uint8 and array.ndim in (3, 4)
    if function is not None:
        if not pixels:
            raise UserError("--preprocess: needs images: a folder, or arrays of bytes (uint8)")
        return _queries(map(Image.fromarray, array), len(array), spec, function)
    pixels = pixels and is_image(spec)
    if pixels:
        channels, last = layout(spec)
        if array.ndim == 3 and channels == 1:
            array = array[..., None]
        if array.ndim == 4 and array.shape[1:] != spec.shape and not last:
            array = array.transpose(0, 3, 1, 2)
    if array.ndim == 0 or array.shape[1:] != spec.shape:
        raise UserError(
            f"--inputs: {where} has queries of shape {array.shape[1:]}, not {spec.shape}"
        )
    return np.ascontiguousarray(array) if pixels else taken(array, spec, f"--inputs: {where}")


def _read_labels(path: Path | None) -> np.ndarray | None:
    if path is None:
        return None
    try:
        if path.suffix == ".npy":
            return np.asarray(np.load(path, allow_pickle=False))
        return np.loadtxt(path, np.int64, ndmin=1)
    except Exception as error:  # NumPy raises many kinds for damaged files
        raise UserError(f"--labels: cannot read {path}: {one_line(error)}") from error


def _checked(labels: np.ndarray, count: int, signature: Signature, where: str) -> np.ndarray:
    """Return labels (N,), which must be classes of the model."""
    if labels.shape != (count,) or labels.dtype.kind not in "iu":
        raise UserError(
            f"{where}: labels are {labels.dtype} {labels.shape}; need one integer for each of "
            f"{count} inputs"
        )
    if signature.scores is not None and len(labels):
        (classes,) = scores_tensor(signature).shape
        low, high = int(labels.min()), int(labels.max())
        if low < 0 or high >= classes:
            raise UserError(
                f"{where}: labels run from {low} to {high}, the model's classes from 0 to "
                f"{classes - 1}"
            )
    return labels.astype(np.int64)


def taken(array: np.ndarray, spec: TensorSpec, where: str) -> np.ndarray:
    """Convert an array to a model's datatype.

    Raises:
        UserError: if it is of another kind, or out of range; `where` names it.
    """
    dtype = DATATYPES[spec.datatype]
    kinds = {"f": "fiu", "i": "iu", "u": "iu", "b": "b"}[dtype.kind]
    if array.dtype.kind not in kinds:
        raise UserError(f"{where} is {array.dtype}, not {spec.datatype}")
    if dtype.kind in "iuf" and array.size:
        bounds: Any = np.finfo(str(dtype)) if dtype.kind == "f" else np.iinfo(str(dtype))
        numbers = array[np.isfinite(array)] if array.dtype.kind == "f" else array
        if numbers.size and not (bounds.min <= numbers.min() and numbers.max() <= bounds.max):
            raise UserError(
                f"{where} has values from {numbers.min()} to {numbers.max()}, out of range for "
                f"{spec.datatype}: convert them as clients do"
            )
    return np.asarray(array, dtype, order="C")


def user_function(name: str, option: str) -> Callable[..., Any]:
    """Return a function by `FILE.py:FUNCTION` or `package.module:function`.

    Raises:
        UserError: if there is none.
    """
    place, _, attribute = name.rpartition(":")
    try:
        function = getattr(user_module(place), attribute)
    except Exception as error:  # whatever the user's module raises
        raise UserError(f"{option} {name}: {type(error).__name__}: {one_line(error)}") from error
    if not callable(function):
        raise UserError(f"{option} {name} is not a function")
    return function  # type: ignore[no-any-return]
