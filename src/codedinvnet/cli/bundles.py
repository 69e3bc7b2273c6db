"""The commands on a trained bundle: `evaluate`, `invert`, `info`, `calibrate` and `demo`."""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from codedinvnet.cli.common import (
    Commands,
    add_bundle_options,
    add_command,
    add_data_options,
    add_model_options,
    print_report,
    seed,
)
from codedinvnet.common.errors import UserError

if TYPE_CHECKING:
    from codedinvnet.data import ImageSource
    from codedinvnet.models.bundle import Bundle


def add_commands(commands: Commands) -> None:
    """Add the commands on a bundle."""
    sub = add_command(
        commands,
        "evaluate",
        _evaluate,
        "erase every member of every group and score the decoded answers",
        "codedinvnet evaluate mnist --k 10 --data-dir data --json",
    )
    add_bundle_options(sub)
    add_data_options(sub)
    add = sub.add_argument
    add("--k", type=int, default=10, help="group size (10)")
    add(
        "--split",
        choices=("test", "validation", "train", "sample"),
        default="test",
        help="which images (test); sample: the 1,000 in the package, of mnist and fashion",
    )
    add("--seed", type=seed, default=0, help="of the groupings (0)")
    add("--groupings", type=int, default=5, help="random groupings to average (5)")
    evidence = "answer from the decoded latent, the side features, or both (both)"
    add("--evidence", choices=("both", "latent", "side"), default="both", help=evidence)
    add("--pixel-mean", action="store_true", help="the average image in place of E")
    add("--shuffle-parity", action="store_true", help="decode with another group's parity output")

    sub = add_command(
        commands,
        "invert",
        _invert,
        "invert the network on real images and measure its Lipschitz bound",
        "codedinvnet invert mnist --data-dir data --json",
    )
    add_bundle_options(sub)
    add_data_options(sub)
    sub.add_argument("--split", choices=("test", "sample"), default="test", help="images (test)")
    sub.add_argument("--tolerance", type=float, default=1e-6, help="of each block, above 0 (1e-6)")
    sub.add_argument("--limit", type=int, help="only the first images (all)")

    sub = add_command(
        commands,
        "info",
        _info,
        "describe a bundle (parameters, multiply-adds, times, provenance), or a model of your own: "
        "its tensors",
        "codedinvnet info mnist --json",
    )
    add_bundle_options(
        sub,
        ", FILE.onnx, or a factory package.module:function",
    )
    add_model_options(sub)
    sub.add_argument("--device", default="auto", help="cpu, cuda, cuda:1 (auto)")

    sub = add_command(
        commands,
        "calibrate",
        _calibrate,
        "measure on held-out images how often a bundle's approximate answers disagree; the shipped "
        "bundles are calibrated",
        "codedinvnet calibrate runs/mine/fusion-k10/bundle --data-dir data",
    )
    add_bundle_options(sub)
    add_data_options(sub)
    sub.add_argument("--out", type=Path, help="the file (calibration.json next to the weights)")
    sub.add_argument("--seed", type=seed, default=0, help="of the groups (0)")

    summary = "recover erased predictions on shipped images"
    sub = add_command(commands, "demo", _demo, summary, "codedinvnet demo")
    sub.add_argument("--seed", type=seed, default=0, help="of the groupings (0)")


def _bundle(arguments: argparse.Namespace) -> Bundle:
    from codedinvnet.evaluation.stages import choose_device
    from codedinvnet.models.bundle import load_bundle

    return load_bundle(arguments.bundle, choose_device(arguments.device))


def _images(arguments: argparse.Namespace, bundle: Bundle, split: str) -> ImageSource:
    from codedinvnet.evaluation.stages import evaluation_images

    return evaluation_images(bundle, split, arguments.data_dir, arguments.download)


def _evaluate(arguments: argparse.Namespace) -> None:
    from codedinvnet.evaluation.accuracy import evaluation_report, scheme_resting_on

    bundle = _bundle(arguments)
    scheme_resting_on(arguments.evidence, bundle, arguments.k)  # or is refused now
    names = ("split", "k", "groupings", "seed", "evidence", "pixel_mean", "shuffle_parity")
    how = {name: getattr(arguments, name) for name in names}
    report = evaluation_report(bundle, _images(arguments, bundle, arguments.split), **how)
    print_report(report, as_json=arguments.json)


def _invert(arguments: argparse.Namespace) -> None:
    from codedinvnet.evaluation.inversion import inversion_report

    bundle = _bundle(arguments)
    source = _images(arguments, bundle, arguments.split)
    report = inversion_report(
        bundle.model, source, tolerance=arguments.tolerance, limit=arguments.limit
    )
    print_report({"bundle": bundle.info.name, "split": arguments.split, **report}, arguments.json)


def _info(arguments: argparse.Namespace) -> None:
    from codedinvnet.models import ModelSource

    options = {name: getattr(arguments, name) for name in ("weights", "scores", "inputs")}
    source = ModelSource(arguments.bundle, **options)
    if source.kind != "bundle" or any(options.values()):
        device = "cpu" if arguments.device == "auto" else arguments.device
        report = replace(source, device=device).open().describe()
        print_report(report if arguments.json else _lines(report), as_json=arguments.json)
        return

    from codedinvnet.evaluation.cost import info_report

    print_report(info_report(_bundle(arguments)), as_json=arguments.json)


def _lines(report: dict[str, Any]) -> dict[str, Any]:
    """Return the description of a model for a reader: a line for every tensor."""
    plain = {key: report[key] for key in ("source", "kind", "platform", "digest")}
    tensors = {
        f"{kind} {tensor['name']}": f"{tensor['datatype']} "
        f"({', '.join(map(str, ('B', *tensor['shape'])))})"
        for kind in ("input", "output")
        for tensor in report[f"{kind}s"]
    }
    scores = report["scores"]
    named = f"{scores['output']} ({scores['kind']})" if scores else "none: name them by --scores"
    batch = report["max_batch"]
    return {**plain, **tensors, "scores": named, "batch": "any" if batch is None else batch}


def _calibrate(arguments: argparse.Namespace) -> None:
    from codedinvnet.common.files import check_writable
    from codedinvnet.evaluation.trust import calibrate
    from codedinvnet.protect.calibration import FILE

    bundle = _bundle(arguments)
    path = arguments.out or bundle.folder / FILE
    try:
        check_writable(path)
    except UserError as error:
        if arguments.out is not None:
            raise
        raise UserError(f"{error}: name another file by --out") from error
    held_out = _images(arguments, bundle, "validation")
    calibration = calibrate(bundle, held_out, arguments.seed)
    calibration.save(path)
    curves = [
        f"{kind.method}, k = {kind.k}, {kind.answer}: {curve.disagreed[-1]} of "
        f"{curve.released[-1]} disagree"
        for kind, curve in calibration.curves.items()
    ]
    print_report({"written": str(path), "images": len(held_out), "curves": curves}, arguments.json)


def _demo(arguments: argparse.Namespace) -> None:
    from codedinvnet.data import SAMPLES
    from codedinvnet.evaluation.demo import run_demo
    from codedinvnet.models.bundle import shipped_bundles

    run_demo([name for name in SAMPLES if name in shipped_bundles()], arguments.seed)
