"""What is measured of the bundles that ship, and the tables of it.

`docs/results/NAME.json` holds what `python -m benchmarks figures --measure` found of a bundle.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from pandas import DataFrame

from codedinvnet.codes.invnet import PaperInvNet
from codedinvnet.common.files import read_json, write_json
from codedinvnet.common.grid import latest, read_rows
from codedinvnet.evaluation import tables
from codedinvnet.evaluation.accuracy import evaluation_report
from codedinvnet.evaluation.cost import info_report
from codedinvnet.evaluation.inversion import inversion_report
from codedinvnet.evaluation.stages import evaluation_images
from codedinvnet.models.bundle import Bundle, load_bundle, weights_digest

BUNDLES = ("mnist", "fashion", "cifar10")
"""In the order of the tables."""
SIZES = (2, 4, 10)
HARD = 10
"""The group size of short tables: the hard case, an overhead of a tenth."""
PAPER_FILES = {
    "`configs/mnist.json`": "paper-mnist-k2.json",
    "`configs/mnist.json`, one thread": "paper-mnist-one-thread-k2.json",
    "`configs/fashion.json`": "paper-fashion-k2.json",
    "`configs/paper/mnist.json`, a fifth of E": "paper-mnist-fifth-k2.json",
}
"""Settings of the paper's four commands, as a table names them -> the file of what they reached."""


def write(folder: Path, name: str, data_dir: Path | None, *, costs_alone: bool) -> None:
    """Measure a bundle, and write its file; what was not measured now is kept."""
    bundle, path = load_bundle(name), folder / f"{name}.json"
    found = {} if costs_alone else measure(name, bundle, data_dir)
    write_json(path, {**read(path), **found, "info": info_report(bundle, SIZES)})


def measure(name: str, bundle: Bundle, data_dir: Path | None) -> dict[str, Any]:
    """Run evaluate (with the sanity check at the largest k) and invert on one bundle."""
    source = evaluation_images(bundle, "test", data_dir)
    report = partial(evaluation_report, bundle, source, split="test")
    return {
        "evaluate": [report(k=k) for k in SIZES],
        "shuffled": report(k=HARD, shuffle_parity=True),
        "invert": inversion_report(bundle.model, source),
        "weights": weights_digest(name),
    }


def read(path: Path) -> dict[str, Any]:
    """Return what a file holds; nothing if it is not there."""
    found: dict[str, Any] = read_json(path) if path.is_file() else {}
    return found


def bundle_files(folder: Path) -> dict[str, dict[str, Any]]:
    """Return what was measured of each bundle that ships."""
    return {name: found for name in BUNDLES if (found := read(folder / f"{name}.json"))}


def table(folder: Path) -> str:
    """Return the accuracy of every bundle at every k.

    The last column has what is recovered from another group's parity.
    """
    lines = []
    for name, found in bundle_files(folder).items():
        for report in found.get("evaluate", ()):
            k = report["k"]
            shares = {
                "normal": report["normal_accuracy"],
                "recovered": report["recovered_accuracy"],
                "worst position": report["worst_position_accuracy"],
                "agreement": report["agreement"],
                "paper's objective": _paper(folder, name, k),
            }
            other = found.get("shuffled", {})
            shares["another parity"] = other.get("recovered_accuracy") if k == HARD else None
            extra = extra_queries(found.get("info", {}), k) / k
            lines.append(
                {"bundle": name, "k": k, "extra multiply-adds": "" if extra != extra else extra}
                | {title: percent(share) for title, share in shares.items()}
            )
    return tables.markdown(DataFrame(lines), {"extra multiply-adds": ".0%"})


def percent(value: float | None) -> str:
    """Return a share in %; "" for None."""
    return "" if value is None else f"{100 * value:.2f}"


def extra_queries(info: Mapping[str, Any], k: int) -> float:
    """Return the multiply-adds of E and f for a parity query of k, in queries of g(f(x)).

    NaN if they are not known.
    """
    if f"encoder_macs_k{k}" not in info:
        return math.nan
    extra = info["embedding_macs"] + info[f"encoder_macs_k{k}"]
    return float(extra / (info["embedding_macs"] + info["head_macs"]))


def _paper(folder: Path, name: str, k: int) -> float | None:
    """Return what `bench accuracy` has of the paper's encoder for a bundle's own f and g."""
    rows = latest(read_rows(folder / "accuracy.jsonl", "accuracy"), tables.TRIAL, ["seed"])
    own = rows[(rows["label"] == PaperInvNet.name) & (rows["dataset"] == name) & (rows["k"] == k)]
    return float(own["recovered"].iloc[-1]) if len(own) else None


COSTS = {
    "embedding f, one image": "embedding_macs",
    "encoder E, ten images": "encoder_macs_k10",
    "small backup for groups of ten, one image": "small_backup_one_macs_k10",
    "embedding f, time": "embedding_ms",
    "encoder E, ten images, time": "encoder_ms_k10",
    "small backup for groups of ten, one image, time": "small_backup_one_ms_k10",
    "small backup, ten images, time": "small_backup_ms_k10",
}
"""Line of the table of costs -> the key of `info`."""


def costs(folder: Path) -> str:
    """Return multiply-adds and times of the parts, and what `invert` found."""
    columns = {}
    for name, found in bundle_files(folder).items():
        info, invert = found["info"], found.get("invert") or {}
        column = {}
        for line, key in COSTS.items():
            macs, value = "_macs" in key, info.get(key, math.nan)
            column[line] = f"{value / 1e6:.2f} M" if macs else f"{value:.1f} ms"
        if "provenance" in info:
            column["training"] = f"{info['provenance']['seconds'] / 60:.0f} min"
        if invert.get("largest_error") is not None:
            column["largest inversion error (pixels in 0..1)"] = f"{invert['largest_error']:.1e}"
        if "coefficient" in invert:
            bound = f"{invert['largest_singular_value']:.4f} ({invert['coefficient']})"
            column["fixed-point iterations, mean"] = f"{invert['iterations']:.1f}"
            column["largest singular value (bound)"] = bound
        columns[name] = column
    return tables.markdown(DataFrame(columns).reset_index(names="")) if columns else ""


def paper(folder: Path) -> str:
    """Return what the paper's four commands reached by each settings file, and in which minutes."""
    names = ("normal_accuracy", "recovered_accuracy", "worst_position_accuracy", "agreement")
    lines = []
    for settings, file in PAPER_FILES.items():
        if found := read(folder / file):
            line = {"settings": settings, "k": found["k"]} | {
                name.replace("_accuracy", "").replace("_", " "): percent(found[name])
                for name in names
            }
            minutes = {f"{stage}, min": f"{s / 60:.1f}" for stage, s in found["seconds"].items()}
            lines.append(line | minutes | {"machine": found["machine"]})
    return tables.markdown(DataFrame(lines)) if lines else ""
