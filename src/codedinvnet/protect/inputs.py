"""The inputs that a protection learns from: images, arrays, or logged requests; and their split."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np

from codedinvnet.errors import UserError, nearest, one_line
from codedinvnet.files import parse_json
from codedinvnet.models.base import Signature, TensorSpec, scores_tensor
from codedinvnet.protect.images import (
    Finish,
    Preprocessing,
    image_paths,
    is_image,
    layout,
    read_images,
    taken,
)

LABELS = "labels"
IMAGES = "images"
"""What an `.npz` may call the one input of a model instead of its name."""
FEWEST = 200
"""Inputs that are needed: with fewer, no interval says anything."""
SHARES = {"validation": (0.10, 2500), "calibration": (0.15, 5000), "test": (0.15, 5000)}
"""Share of the inputs, and most of them, that nothing is trained on."""


@dataclass(frozen=True)
class Inputs:
    """Queries, as they are kept in memory.

    Attributes:
        arrays: name -> (N, *shape); images are kept in bytes.
        finish: name -> what makes the model's input of what is kept; others are taken as they are.
        labels: (N,) integers; None if there are none.
    """

    arrays: Mapping[str, np.ndarray]
    finish: Mapping[str, Finish]
    labels: np.ndarray | None = None

    def __len__(self) -> int:
        return len(next(iter(self.arrays.values())))

    def batch(self, rows: np.ndarray) -> dict[str, np.ndarray]:
        """Return queries as the model takes them, name -> (B, *shape)."""
        kept = {name: array[rows] for name, array in self.arrays.items()}
        return {
            name: self.finish[name](v) if name in self.finish else v for name, v in kept.items()
        }

    def distinct(self) -> Inputs:
        """Return the inputs without repetitions: no tested input may have been trained on."""
        seen: dict[bytes, int] = {}
        for row in range(len(self)):
            seen.setdefault(self._row_digest(row), row)
        rows = np.array(list(seen.values()), np.intp)
        arrays = {name: array[rows] for name, array in self.arrays.items()}
        return Inputs(arrays, self.finish, None if self.labels is None else self.labels[rows])

    def digest(self) -> str:
        """Return a short digest of all queries, as the model would get them."""
        whole = hashlib.sha256()
        for row in range(len(self)):
            whole.update(self._row_digest(row))
        for array in self.batch(np.arange(1)).values():
            whole.update(str(array.dtype).encode() + array.tobytes())
        return whole.hexdigest()[:16]

    def _row_digest(self, row: int) -> bytes:
        digest = hashlib.blake2b(digest_size=16)
        for array in self.arrays.values():
            value = array[row]
            digest.update(
                repr(value.tolist()).encode() if value.dtype == object else value.tobytes()
            )
        return digest.digest()


STREAM = 29
"""Goes into the seed of the split: `default_rng(0).permutation` may have split the same inputs
before, for the model's own training, and all tested inputs would be of its training."""


class Split(NamedTuple):
    """Rows of the inputs, ascending, of which no two parts share any."""

    train: np.ndarray
    validation: np.ndarray
    calibration: np.ndarray
    test: np.ndarray


def split(count: int, seed: int) -> Split:
    """Return a random split of so many inputs.

    Args:
        count: how many there are.
        seed: of the split.

    Raises:
        UserError: if they are too few.
    """
    if count < FEWEST:
        raise UserError(
            f"--inputs: {count} different inputs are too few: at least {FEWEST} are needed"
        )
    order = np.random.default_rng((seed, STREAM)).permutation(count)
    sizes = [min(most, round(share * count)) for share, most in SHARES.values()]
    *parts, train = np.split(order, np.cumsum(sizes))
    validation, calibration, test = (np.sort(part) for part in parts)
    return Split(np.sort(train), validation, calibration, test)


OF_FOLDERS = {"--preprocess": "function", "--resize": "resize", "--crop": "crop"}
"""Options that make images of a folder into a model's input."""
OF_BYTES = {name: name[2:] for name in ("--scale", "--mean", "--std")}
"""Options of all images in bytes."""


def check_given(how: Preprocessing, options: Mapping[str, str], why: str) -> None:
    """Refuse options that would do nothing.

    Args:
        how: what was asked for.
        options: those options, and the fields that hold them.
        why: what they are of, and what there is instead.

    Raises:
        UserError: naming all of them that were given.
    """
    unset = Preprocessing()
    given = [
        name for name, field in options.items() if getattr(how, field) != getattr(unset, field)
    ]
    if given:
        raise UserError(f"{', '.join(given)}: {why}")


def check_preparation(how: Preprocessing, path: Path) -> None:
    """Refuse options for images that this kind of inputs has no use for, before they are read.

    Args:
        how: what was asked for.
        path: see `read_inputs`.

    Raises:
        UserError: naming the options.
    """
    if path.is_dir():
        if how.function:
            why = "goes without --preprocess, which makes the whole query"
            check_given(replace(how, function=""), {**OF_FOLDERS, **OF_BYTES}, why)
        return
    if path.suffix == ".jsonl":
        why = f"goes with images, and those of {path} are queries as the model takes them"
        check_given(how, {**OF_FOLDERS, **OF_BYTES}, why)
    check_given(how, OF_FOLDERS, f"goes with a folder of images, and {path} is none")


def read_inputs(
    path: Path, signature: Signature, how: Preprocessing, labels: Path | None = None
) -> Inputs:
    """Read the inputs that a path holds.

    Args:
        path: a folder of images; `.npz` or `.npy`; or `.jsonl`, a V2 request a line.
        signature: the model's.
        how: how images are prepared.
        labels: `.npy` or a text file with an integer a line, from 0 on, in the inputs' order; an
            `.npz` has its own.

    Raises:
        UserError: if there is nothing that the model takes, or labels are no classes of its own.
    """
    specs = {spec.name: spec for spec in signature.inputs}
    if not path.exists():
        raise UserError(f"--inputs: there is no {path}")
    check_preparation(how, path)
    finish: dict[str, Finish] = {}
    whose = f"--labels: {labels}" if labels else f"--inputs: {path}"
    told = _checked(_labels(labels), signature, whose) if labels else None
    if path.is_dir():
        if len(specs) > 1:
            raise UserError(f"--inputs: a folder of images does not tell all of {', '.join(specs)}")
        (spec,) = specs.values()
        paths = image_paths(path)
        _check_count(told, len(paths), whose)  # before all are read
        arrays = {spec.name: read_images(paths, spec, how)}
        if not how.function:
            finish[spec.name] = how.finish(spec, arrays[spec.name])
    elif path.suffix in (".npz", ".npy"):
        found = _arrays(path, list(specs))
        own = found.pop(LABELS, None) if LABELS not in specs else None
        if told is None and own is not None:
            told = _checked(own, signature, whose)
        arrays = {}
        for name, spec in specs.items():
            arrays[name], done = _fitted(found[name], spec, how, path)
            finish.update({name: done} if done else {})
        if not finish:
            kinds = ", ".join(str(found[name].dtype) for name in specs)
            check_given(how, OF_BYTES, f"goes with images in bytes (uint8), and {path} has {kinds}")
    elif path.suffix == ".jsonl":
        arrays = _requests(path, specs)
    else:
        raise UserError(f"--inputs: {path} is no folder of images, .npz, .npy or .jsonl")
    counts = {name: len(array) for name, array in arrays.items()}
    if len(set(counts.values())) > 1:
        raise UserError(f"--inputs: {path} has different numbers of queries: {counts}")
    _check_count(told, next(iter(counts.values())), whose)
    return Inputs(arrays, finish, told)


def _arrays(path: Path, names: list[str]) -> dict[str, np.ndarray]:
    try:
        loaded = np.load(path, allow_pickle=False)
        found = loaded if isinstance(loaded, np.ndarray) else dict(loaded.items())
    except Exception as error:  # NumPy has many for what is damaged
        raise UserError(
            f"--inputs: {path} is damaged, or holds objects: {one_line(error)}"
        ) from error
    if isinstance(found, np.ndarray):
        if len(names) > 1:
            raise UserError(f"--inputs: the model takes {', '.join(names)}: give them in an .npz")
        return {names[0]: found}
    if len(names) == 1 and names[0] not in found and IMAGES in found:
        found[names[0]] = found.pop(IMAGES)
    for name in names:
        if name not in found:
            near = nearest(name, found)
            hint = f", did you mean to name {near!r} so?" if near else ""
            raise UserError(f"--inputs: {path} has no array {name!r} of the model's inputs{hint}")
    return found


def _fitted(
    array: np.ndarray, spec: TensorSpec, how: Preprocessing, path: Path | str
) -> tuple[np.ndarray, Finish | None]:
    """Return an array in the model's shape, and what is still to be done to its batches."""
    pixels = is_image(spec) and array.ndim in (3, 4) and array.dtype == np.uint8
    if pixels:
        channels, last = layout(spec)
        if array.ndim == 3 and channels == 1:
            array = array[..., None]
        if array.ndim == 4 and array.shape[1:] != spec.shape and not last:
            array = array.transpose(0, 3, 1, 2)
    if array.shape[1:] != spec.shape or array.ndim == 0:
        one_axis = array.ndim == 2 and len(spec.shape) == 1
        hint = ": if clients pad or cut it, do so here" if one_axis else ""
        raise UserError(
            f"--inputs: {spec.name!r} of {path} has queries of shape {array.shape[1:]}, and the "
            f"model takes {spec.shape}{hint}"
        )
    if pixels:
        return np.ascontiguousarray(array), how.finish(spec, array)
    return taken(array, spec, f"--inputs: {spec.name!r} of {path}"), None


def _requests(path: Path, specs: Mapping[str, TensorSpec]) -> dict[str, np.ndarray]:
    parts: dict[str, list[np.ndarray]] = {name: [] for name in specs}
    for number, line in enumerate(path.read_bytes().splitlines(), 1):
        if not line.strip():
            continue
        where = f"--inputs: {path}, line {number}"
        request = parse_json(line, where)
        try:
            tensors = {tensor["name"]: tensor for tensor in request["inputs"]}
            found = {
                name: np.array(tensors[name]["data"]).reshape(tensors[name]["shape"])
                for name in specs
            }
        except (TypeError, KeyError, ValueError) as error:
            raise UserError(f"{where} is no request with {', '.join(specs)}: {error}") from error
        for name, spec in specs.items():
            place = f"{path}, line {number}"
            parts[name].append(_fitted(found[name], spec, Preprocessing(), place)[0])
    if not next(iter(parts.values())):
        raise UserError(f"--inputs: {path} has no request")
    return {name: np.concatenate(found) for name, found in parts.items()}


def _labels(path: Path) -> np.ndarray:
    try:
        if path.suffix == ".npy":
            return np.asarray(np.load(path, allow_pickle=False))
        return np.array([int(word) for word in path.read_text().split()], np.int64)
    except Exception as error:  # NumPy has many for what is damaged
        raise UserError(
            f"--labels: {path} is neither .npy nor an integer a line: {one_line(error)}"
        ) from error


def _checked(labels: np.ndarray, signature: Signature, where: str) -> np.ndarray:
    """Return labels (N,) of the model's classes.

    Args:
        labels: as they were read.
        signature: the model's; without scores nobody knows its classes.
        where: what names the labels in errors.

    Raises:
        UserError: if they are no integers, or other classes than the model's.
    """
    if labels.ndim != 1 or labels.dtype.kind not in "iu":
        raise UserError(
            f"{where}: labels are {labels.dtype} {labels.shape}, and one integer an input is wanted"
        )
    if signature.scores is not None and len(labels):
        (classes,) = scores_tensor(signature).shape
        low, high = int(labels.min()), int(labels.max())
        if low < 0 or high >= classes:
            hint = ": do they begin at 1?" if low > 0 and high == classes else ""
            raise UserError(
                f"{where}: labels go from {low} to {high}, and the model's {classes} classes from "
                f"0 to {classes - 1}{hint}"
            )
    return labels.astype(np.int64)


def _check_count(labels: np.ndarray | None, count: int, where: str) -> None:
    """Raise UserError unless there are as many labels as inputs, or none at all."""
    if labels is not None and len(labels) != count:
        raise UserError(f"{where}: there are {len(labels)} labels, and {count} inputs")
