"""`python -m benchmarks protected`: models of users, protected; the rows of docs/results/protect.

Each row has a recipe: where its model and its inputs come from, and the options of `codedinvnet
protect`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib import import_module
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from pandas import DataFrame

from codedinvnet.cli import main
from codedinvnet.common.errors import UserError
from codedinvnet.common.files import read_json, write_json
from codedinvnet.common.provenance import without_folders
from codedinvnet.evaluation.tables import markdown
from codedinvnet.protection.folder import DESCRIPTION, FORMAT
from codedinvnet.protection.measure import AGREEMENTS

RESULTS = Path("docs/results/protect")


Make: TypeAlias = Callable[[Path, Path | None], Path]
"""Writes `model.onnx` and inputs into a folder, from the source; returns the inputs' path."""


def run(row: str | None, out: Path | None, source: Path | None, minutes: float) -> dict[str, Any]:
    """Make a row, if one is named, and return the tables of all rows.

    Args:
        row: the name of the recipe; None: only the tables are wanted.
        out: for the model, its inputs and its protection; what is there is kept.
        source: see `RECIPES`; None if the recipe needs none.
        minutes: for `protect`.

    Raises:
        UserError: if a source is missing, or `protect` failed.
    """
    if row is not None:
        if out is None:
            raise UserError("--out: name a folder for the model and its protection")
        out.mkdir(parents=True, exist_ok=True)
        make, *options = RECIPES[row]
        inputs, folder = make(out, source), out / f"{row}-protection"
        words = ["protect", str(out / "model.onnx"), "--inputs", str(inputs), "--out", str(folder)]
        words += ["--minutes", f"{minutes:g}", *options]
        if not (folder / DESCRIPTION).is_file():
            main(words)
        if not (folder / DESCRIPTION).is_file():
            raise UserError(f"{row}: codedinvnet protect failed")
        found: dict[str, Any] = read_json(folder / DESCRIPTION)
        found["model"]["source"] = without_folders(found["model"]["source"])
        write_json(RESULTS / f"{row}.json", found)
    return {"table": table(RESULTS)}


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


def _digits(place: str, **options: Any) -> Make:
    """Return what trains scikit-learn's estimator on half of its digits."""

    def make(folder: Path, source: Path | None) -> Path:
        x, y = import_module("sklearn.datasets").load_digits(return_X_y=True)
        x = x.astype(np.float32)
        rows = np.random.default_rng(0).permutation(len(x))[:900]
        module, _, kind = place.partition(":")
        fitted = getattr(import_module(module), kind)(**options).fit(x[rows], y[rows])
        made = import_module("skl2onnx").to_onnx(fitted, x[:1], options={"zipmap": False})
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


MLP, TREES = "sklearn.neural_network:MLPClassifier", "sklearn.ensemble:GradientBoostingClassifier"
RESNET: tuple[Any, ...] = (_cifar10, "--task", "classify")
RECIPES: Mapping[str, tuple[Any, ...]] = {
    "digits-mlp": (_digits(MLP, max_iter=500, random_state=0),),
    "digits-boosted": (_digits(TREES, random_state=0),),
    **dict.fromkeys(("resnet20", "resnet32", "resnet56"), RESNET),
}
"""By the name of the row: what makes it, and the options of `codedinvnet protect`. `--source` is
the folder of CIFAR-10's arrays."""
