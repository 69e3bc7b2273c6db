"""The command `protect`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from codedinvnet.cli.common import (
    Commands,
    add_command,
    add_model_options,
    add_model_token,
    flushing_denormals,
    print_report,
    seed,
)
from codedinvnet.errors import UserError


def add_commands(commands: Commands) -> None:
    """Add `protect`."""
    sub = add_command(
        commands,
        "protect",
        _protect,
        "train and measure what makes up for a model's late answers, from unlabelled inputs",
        "codedinvnet protect model.onnx --inputs images/ --k 10 --out model-protection",
    )
    sub.add_argument(
        "model",
        help="FILE.onnx, a factory package.module:function, "
        "or a server's model, http://HOST:PORT/v2/models/NAME",
    )
    add_model_options(sub)
    add_model_token(sub)
    add = sub.add_argument
    add(
        "--inputs",
        dest="queries",
        type=Path,
        required=True,
        help="folder of images, .npz or .npy arrays, or .jsonl with a V2 request a line",
    )
    add("--out", type=Path, required=True, help="folder of the protection")
    add("--k", type=int, default=10, help="queries in a group (10)")
    add("--minutes", type=_positive, default=30.0, help="to ask about the inputs and train in (30)")
    add(
        "--labels",
        type=Path,
        help=".npy or text, a class a line, counted from 0, in the order of the inputs (for images "
        "that of their paths), for an accuracy column (none)",
    )
    add("--resize", type=int, help="pixels of images' shorter side (to the model's size)")
    add("--crop", type=int, help="pixels of the middle square (the model's size)")
    add("--scale", type=float, help="factor of pixels 0..255 (1/255 for floats)")
    add("--mean", type=_numbers, default=(), help="subtracted then: a number, or one a channel (0)")
    add("--std", type=_numbers, default=(), help="divides then: a number, or one a channel (1)")
    add(
        "--preprocess",
        default="",
        metavar="FUNCTION",
        help="package.module:function or FILE.py:function, from a Pillow image to one query (none)",
    )
    add("--no-flip", action="store_true", help="do not mirror images in training")
    add(
        "--shift",
        type=int,
        help="pixels by which images are shifted in training (an eighth of the height if the model "
        "keeps its answers, else 0)",
    )
    add("--backup", metavar="MODEL", help="a smaller model's file, for the same inputs (none)")
    add(
        "--methods",
        help="what is trained and measured, names with commas; there is also code (a small backup "
        "and the codes that need no training)",
    )
    add("--threads", type=int, default=1, help="to compute with (1)")
    add("--seed", type=seed, default=0, help="of the split and the training (0)")
    add("--json", action="store_true", help="print one JSON object")


def _numbers(text: str) -> tuple[float, ...]:
    return tuple(float(word) for word in text.split(","))


def _positive(text: str) -> float:
    value = float(text)
    if not 0 < value < 1e6:
        raise argparse.ArgumentTypeError(f"must be above 0, got {text}")
    return value


@flushing_denormals
def _protect(arguments: argparse.Namespace) -> None:
    from codedinvnet.models import ModelSource
    from codedinvnet.protect.images import Preprocessing
    from codedinvnet.protect.measure import table
    from codedinvnet.protect.run import protect
    from codedinvnet.protect.setting import ProtectOptions

    if arguments.threads < 1:
        raise UserError(f"--threads: must be at least 1, got {arguments.threads}")
    source = ModelSource(
        arguments.model,
        arguments.weights,
        arguments.scores,
        inputs=tuple(arguments.inputs),
        threads=arguments.threads,
        token_file=arguments.model_token_file,
    )
    fields = ("resize", "crop", "scale", "mean", "std")
    how = Preprocessing(
        **{name: getattr(arguments, name) for name in fields}, function=arguments.preprocess
    )
    found = protect(
        ProtectOptions(
            source,
            arguments.queries,
            arguments.out,
            arguments.k,
            arguments.minutes,
            arguments.seed,
            arguments.labels,
            how,
            not arguments.no_flip,
            arguments.shift,
            arguments.backup,
            tuple(arguments.methods.split(",")) if arguments.methods else ProtectOptions.methods,
        )
    )
    if arguments.json:
        print_report(found, as_json=True)
        return
    print(table(found["table"]))
    _print_rest(found)


def _print_rest(found: dict[str, Any]) -> None:
    """Print what stands beside the table: costs, notes and the recommendation."""
    print()
    for name, part in found["parts"].items():
        median, low, high = part["ms"]
        macs = f", {part['macs']:,} multiply-adds" if part.get("macs") else ""
        print(f"{name}: {median:.3f} ms ({low:.3f} to {high:.3f}){macs}")
    for note in [*found["notes"], *(row["note"] for row in found["table"] if "note" in row)]:
        print(note)
    print(f"recommended: {found['recommended'] or 'none'}: {found['reason']}")
