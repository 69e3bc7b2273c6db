"""The commands on what approximate answers may be relied on: `calibrate` and `trust`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from codedinvnet.cli.common import (
    Commands,
    add_bundle_options,
    add_command,
    add_data_options,
    print_report,
    seed,
)
from codedinvnet.errors import UserError

LIMITS = (0.005, 0.01, 0.02)


def limit(text: str) -> float:
    """Parse a limit on disagreement."""
    value = float(text)
    if not 0 < value < 1:
        raise argparse.ArgumentTypeError(f"must lie between 0 and 1, got {text}")
    return value


def add_commands(commands: Commands) -> None:
    """Add both commands."""
    sub = add_command(
        commands,
        "calibrate",
        _calibrate,
        "measure on held-out images how far a bundle's approximate answers can be relied on; the "
        "shipped bundles are calibrated",
        "codedinvnet calibrate runs/mine/fusion-k10/bundle --data-dir data",
    )
    add_bundle_options(sub)
    add_data_options(sub)
    sub.add_argument("--out", type=Path, help="the file (calibration.json beside the weights)")
    sub.add_argument("--seed", type=seed, default=0, help="of the groups (0)")

    sub = add_command(
        commands,
        "trust",
        _trust,
        "check over random splits that released answers keep a limit on disagreement",
        "codedinvnet trust mnist --data-dir data --max-disagreement 0.01",
    )
    add_bundle_options(sub, ", or of a protection")
    add_data_options(sub)
    sub.add_argument(
        "--max-disagreement",
        type=limit,
        action="append",
        help="share of the released answers that may disagree; repeatable (0.005, 0.01, 0.02)",
    )
    sub.add_argument("--k", type=int, help="group size (10; a protection has its own)")
    sub.add_argument("--splits", type=int, default=200, help="random splits (200)")
    sub.add_argument("--seed", type=seed, default=0, help="of groups and splits (0)")


def _calibrate(arguments: argparse.Namespace) -> None:
    from codedinvnet.evaluation.trust import calibrate
    from codedinvnet.files import check_writable
    from codedinvnet.models.bundle import load_bundle
    from codedinvnet.stages import choose_device, evaluation_images
    from codedinvnet.trust.calibration import FILE

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


def _trust(arguments: argparse.Namespace) -> None:
    from codedinvnet.evaluation.trust import reliability_rows, trust_rows
    from codedinvnet.models.bundle import load_bundle
    from codedinvnet.protect.calibration import protection_rows
    from codedinvnet.protect.folder import DESCRIPTION
    from codedinvnet.stages import choose_device, evaluation_images

    if arguments.splits < 1:
        raise UserError(f"--splits: must be at least 1, got {arguments.splits}")
    limits = arguments.max_disagreement or LIMITS
    if (Path(arguments.bundle) / DESCRIPTION).is_file():
        _check_unneeded(arguments)
        how = {"seed": arguments.seed, "splits": arguments.splits}
        _tell(*protection_rows(Path(arguments.bundle), limits, **how), as_json=arguments.json)
        return
    bundle = load_bundle(arguments.bundle, choose_device(arguments.device))
    k = 10 if arguments.k is None else arguments.k
    bundle.info.check_size("k", k)
    held_out, test = (
        evaluation_images(bundle, split, arguments.data_dir, arguments.download)
        for split in ("validation", "test")
    )
    rows = trust_rows(
        bundle,
        held_out,
        test,
        limits,
        k=k,
        seed=arguments.seed,
        splits=arguments.splits,
    )
    if not rows:
        raise UserError(
            f"{arguments.bundle} is not calibrated for k = {k}: `codedinvnet calibrate` does that"
        )
    reliability = reliability_rows(bundle, test, k=k, seed=arguments.seed)
    _tell(rows, reliability, as_json=arguments.json)


def _check_unneeded(arguments: argparse.Namespace) -> None:
    """Refuse options that tell how a bundle is asked: a protection has its answers."""
    given = {
        "--k": arguments.k is not None,
        "--data-dir": arguments.data_dir is not None,
        "--download": arguments.download,
        "--device": arguments.device != "auto",
    }
    for flag in (flag for flag, is_there in given.items() if is_there):
        raise UserError(f"{flag}: is for a bundle, not for the protection {arguments.bundle}")


def _tell(rows: list[dict[str, Any]], reliability: list[dict[str, Any]], *, as_json: bool) -> None:
    from codedinvnet.provenance import describe_commit, describe_machine

    if as_json:
        report = {"rows": rows, "reliability": reliability}
        told = {"commit": describe_commit(), "machine": describe_machine()}
        print_report({**report, **told}, as_json=True)
        return
    for row in [*rows, *reliability]:
        print_report(row, as_json=False)
        print()
