"""The command `protect`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from codedinvnet.cli.common import (
    Commands,
    add_command,
    add_model_options,
    flushing_denormals,
    print_report,
    seed,
)
from codedinvnet.common.errors import UserError


def add_commands(commands: Commands) -> None:
    """Add `protect`."""
    sub = add_command(
        commands,
        "protect",
        _protect,
        "train a small backup that answers while a model is late, from unlabelled inputs",
        "codedinvnet protect model.onnx --inputs images/ --out model-protection",
    )
    sub.add_argument(
        "model",
        help="FILE.onnx, or a factory package.module:function",
    )
    add_model_options(sub)
    add = sub.add_argument
    add(
        "--inputs",
        dest="queries",
        type=Path,
        required=True,
        help="folder of images, or .npz or .npy arrays",
    )
    add("--out", type=Path, required=True, help="folder of the protection")
    add("--minutes", type=_positive, default=30.0, help="for scoring and training together (30)")
    add(
        "--work",
        type=_positive,
        help="train one size only, this share of the model's work (0.1, 0.25 and 0.5)",
    )
    add("--k", type=int, default=10, help="queries in a group under policy small-backup (10)")
    add(
        "--preprocess",
        default="",
        metavar="FILE.py:FUNCTION",
        help="makes one query of a Pillow image (images are resized, and bytes divided by 255)",
    )
    add("--no-flip", action="store_true", help="do not mirror images in training")
    add("--threads", type=int, help="threads to score and train with (all cores)")
    add("--seed", type=seed, default=0, help="of the split and the training (0)")
    add("--json", action="store_true", help="print one JSON object")


def _positive(text: str) -> float:
    value = float(text)
    if not 0 < value < 1e6:
        raise argparse.ArgumentTypeError(f"must be above 0, got {text}")
    return value


@flushing_denormals
def _protect(arguments: argparse.Namespace) -> None:
    import torch

    from codedinvnet.models import ModelSource
    from codedinvnet.protect.measure import table
    from codedinvnet.protect.run import ProtectOptions, protect

    if arguments.threads is not None and arguments.threads < 1:
        raise UserError(f"--threads: must be at least 1, got {arguments.threads}")
    source = ModelSource(
        arguments.model,
        arguments.weights,
        arguments.scores,
        inputs=tuple(arguments.inputs),
        threads=arguments.threads or torch.get_num_threads(),
    )
    found = protect(
        ProtectOptions(
            source,
            arguments.queries,
            arguments.out,
            k=arguments.k,
            minutes=arguments.minutes,
            work=arguments.work,
            seed=arguments.seed,
            preprocess=arguments.preprocess,
            mirror=not arguments.no_flip,
        )
    )
    if arguments.json:
        print_report(found, as_json=True)
        return
    print(table(found["table"]))
    _print_rest(found)


def _print_rest(found: dict[str, Any]) -> None:
    """Print the model's cost, the notes and the recommendation."""
    model = found["model"]
    median, low, high = model["ms"]
    macs = f", {model['macs']:,} multiply-adds" if model["macs"] else ""
    print(f"\nthe model: {median:.3f} ms a query ({low:.3f} to {high:.3f}){macs}")
    for note in [*found["notes"], *(row["note"] for row in found["table"] if "note" in row)]:
        print(note)
    print(f"recommended: {found['recommended'] or 'none'}: {found['reason']}")
