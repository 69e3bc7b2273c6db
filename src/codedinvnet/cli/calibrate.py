"""The command `calibrate`."""

from __future__ import annotations

import argparse
from pathlib import Path

from codedinvnet.cli.common import (
    Commands,
    add_bundle_options,
    add_command,
    add_data_options,
    print_report,
    seed,
)
from codedinvnet.errors import UserError


def add_commands(commands: Commands) -> None:
    """Add `calibrate`."""
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
    sub.add_argument("--out", type=Path, help="the file (calibration.json beside the weights)")
    sub.add_argument("--seed", type=seed, default=0, help="of the groups (0)")


def _calibrate(arguments: argparse.Namespace) -> None:
    from codedinvnet.evaluation.trust import calibrate
    from codedinvnet.files import check_writable
    from codedinvnet.models.bundle import load_bundle
    from codedinvnet.protect.calibration import FILE
    from codedinvnet.stages import choose_device, evaluation_images

    bundle = load_bundle(arguments.bundle, choose_device(arguments.device))
    path = arguments.out or bundle.folder / FILE
    try:
        check_writable(path)
    except UserError as error:
        if arguments.out is not None:
            raise
        raise UserError(f"{error}: name another file by --out") from error
    held_out = evaluation_images(bundle, "validation", arguments.data_dir, arguments.download)
    calibration = calibrate(bundle, held_out, arguments.seed)
    calibration.save(path)
    curves = [
        f"{kind.method}, k = {kind.k}, {kind.answer}: {curve.disagreed[-1]} of "
        f"{curve.released[-1]} disagree"
        for kind, curve in calibration.curves.items()
    ]
    print_report({"written": str(path), "images": len(held_out), "curves": curves}, arguments.json)
