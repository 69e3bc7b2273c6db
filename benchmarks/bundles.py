"""What is measured of the bundles that ship, and the tables of it.

`docs/results/NAME.json` holds what `python -m benchmarks.figures --measure` found of a bundle.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from pandas import DataFrame

from codedinvnet.codes.backup import backup_network, backup_width
from codedinvnet.codes.equal_cost import macs, plain_network, plain_width, served_macs
from codedinvnet.codes.invnet import PaperInvNet
from codedinvnet.codes.mean import Evidence
from codedinvnet.common.files import read_json, write_json
from codedinvnet.evaluation import tables
from codedinvnet.evaluation.accuracy import evaluation_report
from codedinvnet.evaluation.cost import info_report
from codedinvnet.evaluation.grid import latest, read_rows
from codedinvnet.evaluation.inversion import inversion_report
from codedinvnet.evaluation.stages import evaluation_images
from codedinvnet.models.bundle import Bundle, load_bundle, shipped_bundles, weights_digest

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
EVIDENCE: tuple[Evidence, ...] = ("both", "latent", "side")


def write(folder: Path, name: str, data_dir: Path | None, *, costs_alone: bool) -> None:
    """Measure a bundle, and write its file, in which what was not measured now is kept."""
    bundle, path = load_bundle(name), folder / f"{name}.json"
    found = {} if costs_alone else measure(name, bundle, data_dir)
    write_json(path, {**read(path), **found, "info": info_report(bundle, SIZES)})


def measure(name: str, bundle: Bundle, data_dir: Path | None) -> dict[str, Any]:
    """Run evaluate (with both sanity arms at the largest k) and invert on one bundle."""
    source = evaluation_images(bundle, "test", data_dir)
    report = partial(evaluation_report, bundle, source, split="test")
    arms: dict[str, list[dict[str, Any]]] = {
        evidence: [report(k=k, evidence=evidence) for k in SIZES] for evidence in EVIDENCE
    }
    return {
        "evaluate": arms["both"],
        "latent": arms["latent"],
        "side": arms["side"],
        "shuffled": report(k=HARD, shuffle_parity=True),
        "pixel_mean": None
        if bundle.model.encoder.keeps_apart  # its recovery head needs more than the average image
        else report(k=HARD, pixel_mean=True),
        "invert": inversion_report(bundle.model, source),
        "weights": weights_digest(name),
    }


def read(path: Path) -> dict[str, Any]:
    """Return what a file holds; nothing if it is not there."""
    found: dict[str, Any] = read_json(path) if path.is_file() else {}
    return found


def bundle_files(folder: Path) -> dict[str, dict[str, Any]]:
    """Return what was measured of each bundle that ships, and of others of a known name."""
    names = dict.fromkeys((*BUNDLES, *shipped_bundles()))
    return {name: found for name in names if (found := read(folder / f"{name}.json"))}


def table(folder: Path) -> str:
    """Return the accuracy of every bundle at every k, and what each kind of evidence is worth."""
    lines = []
    for name, found in bundle_files(folder).items():
        for place, report in enumerate(found.get("evaluate", ())):
            k = report["k"]
            again = read(folder / f"seed-{name}.json").get(f"test_k{k}", {})
            lines.append(
                {
                    "bundle": name,
                    "k": k,
                    "extra queries": 1 / k,
                    "extra multiply-adds": extra_queries(found.get("info", {}), k) / k,
                    "normal": report["normal_accuracy"],
                    "recovered": report["recovered_accuracy"],
                    "another seed": again.get("recovered_accuracy"),
                    "worst position": report["worst_position_accuracy"],
                    "agreement": report["agreement"],
                    "latent alone": found["latent"][place]["recovered_accuracy"],
                    "side alone": found["side"][place]["recovered_accuracy"],
                    "paper's objective": _paper(folder, name, k),
                }
            )
    frame = DataFrame(lines)
    for column in frame.columns[4:]:
        frame[column] = [percent(value) for value in frame[column]]
    return tables.markdown(frame, dict.fromkeys(("extra queries", "extra multiply-adds"), ".0%"))


def percent(value: float | None) -> str:
    """Return a share in %; "" for None."""
    return "" if value is None or math.isnan(value) else f"{100 * value:.2f}"


def extra_queries(info: Mapping[str, Any], k: int) -> float:
    """Return the multiply-adds of E and f for a parity query of k, in queries of g(f(x)).

    NaN if they are not known. What the front end reads in a mosaic's parity is not among them.
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


def checks(folder: Path) -> str:
    """Return what is left when a part of the evidence is taken away, at the largest k."""
    return tables.markdown(
        DataFrame(
            {
                "bundle": name,
                "k": found["shuffled"]["k"],
                "recovered": percent(found["evaluate"][-1]["recovered_accuracy"]),
                "with another group's parity": percent(found["shuffled"]["recovered_accuracy"]),
                "with the average image": percent(
                    (found.get("pixel_mean") or {}).get("recovered_accuracy")
                ),
            }
            for name, found in bundle_files(folder).items()
            if "shuffled" in found
        )
    )


COSTS: Mapping[str, tuple[str, Callable[[Any], str]]] = {
    "embedding f, one image": ("info", lambda i: f"{i['embedding_macs'] / 1e6:.1f} M"),
    "encoder E, ten images": ("info", lambda i: f"{i['encoder_macs_k10'] / 1e6:.1f} M"),
    "extra multiply-adds for a group of ten": (
        "info",
        lambda i: f"{extra_queries(i, HARD) / HARD:.0%}",
    ),
    "recovery head": ("info", lambda i: f"{i['recovery_head_macs'] / 1e6:.2f} M"),
    "reading z_p for the recovery head, once a group": (
        "info",
        lambda i: f"{i['reading_macs'] / 1e6:.2f} M" if i["reading_macs"] else "none",
    ),
    "embedding f, time": ("info", lambda i: f"{i['embedding_ms']:.1f} ms"),
    "encoder E, ten images, time": ("info", lambda i: f"{i['encoder_ms_k10']:.1f} ms"),
    "small backup for groups of ten, one image, time": (
        "info",
        lambda i: f"{i['small_backup_one_ms_k10']:.1f} ms",
    ),
    "small backup, ten images, time": ("info", lambda i: f"{i['small_backup_ms_k10']:.1f} ms"),
    "training": ("info", lambda i: f"{i['provenance']['seconds'] / 60:.0f} min"),
    "largest inversion error (pixels in 0..1)": ("invert", lambda i: f"{i['largest_error']:.1e}"),
    "fixed-point iterations, mean": (
        "invert",
        lambda i: f"{i['iterations']:.1f}" if "coefficient" in i else "none",
    ),
    "largest singular value (bound)": (
        "invert",
        lambda i: (
            f"{i['largest_singular_value']:.4f} ({i['coefficient']})"
            if "coefficient" in i
            else "no bound"
        ),
    ),
}
"""Line of the table of costs -> the section of a bundle's file, and what writes the cell."""


def costs(folder: Path) -> str:
    """Return multiply-adds and times of the parts, and what `invert` found."""

    def cell(found: Mapping[str, Any], section: str, form: Callable[[Any], str]) -> str:
        try:
            return form(found[section])
        except (KeyError, TypeError):  # a null stands for what could not be measured
            return "not measured"

    files = bundle_files(folder)
    lines = [
        {"": label, **{name: cell(found, *cost) for name, found in files.items()}}
        for label, cost in COSTS.items()
    ]
    return tables.markdown(DataFrame(lines)) if files else ""


def rivals(folder: Path) -> str:
    """Return multiply-adds of the classifiers in the tables of the methods, for one image each."""
    models = {name: load_bundle(name).model for name in BUNDLES if name in shipped_bundles()}
    lines = [
        {
            "multiply-adds of one image": name,
            "g(f(x))": served_macs(model),
            "the plain ResNet": macs(plain_network(model, plain_width(model)).eval(), model),
            f"the small backup, k = {HARD}": macs(
                backup_network(model, backup_width(model, HARD)).eval(), model
            ),
        }
        for name, model in models.items()
    ]
    frame = DataFrame(lines).set_index("multiply-adds of one image")
    return tables.markdown((frame / 1e6).map("{:.1f} M".format).T.reset_index(names=""))


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
