"""The command `load`."""

from __future__ import annotations

import argparse
from pathlib import Path

from codedinvnet.cli.common import Commands, add_command, seed
from codedinvnet.cli.options import add_config, settings_of


def add_commands(commands: Commands) -> None:
    """Add `load`; the names of its options are the fields of `LoadOptions`."""
    sub = add_command(
        commands,
        "load",
        _load,
        "send requests to a server of the Open Inference Protocol V2 at times that do not depend "
        "on its answers, and tell the percentiles of their latency",
        "codedinvnet load http://127.0.0.1:8000/v2/models/mnist --rate 50 --duration 20",
    )
    sub.add_argument(
        "url",
        nargs="?",
        metavar="URL",
        help="the model, http://HOST:PORT/v2/models/NAME, or its server, http://... or grpc://...",
    )
    add = sub.add_argument
    add("--model", metavar="NAME", help="the model, if the URL does not say it")
    add("--model-version", help="its version (the server's choice)")
    add("--rate", type=float, help="requests a second (those of the log, or 10)")
    add("--duration", type=float, help="seconds for which requests are sent (30)")
    add(
        "--arrivals",
        metavar="HOW",
        help="poisson, constant, or a log: a file whose lines begin with a time, in seconds or as "
        "2026-01-31 12:00:00.500, behind a point or a comma (poisson)",
    )
    add("--batch", type=int, help="queries of a request (1)")
    add(
        "--inputs",
        type=Path,
        help="what is sent: a folder of images, .npz, .npy, or .jsonl with a request a line "
        "(random values)",
    )
    add(
        "--input",
        dest="shapes",
        action="append",
        metavar="NAME:DATATYPE:SHAPE",
        help="the shape of one query of an input, where the model takes any; repeatable",
    )
    add(
        "--header",
        action="append",
        metavar="'NAME: VALUE'",
        help="sent with every request, as 'Authorization: Bearer ...'; repeatable",
    )
    add("--timeout", type=float, help="seconds for an answer, connecting included (60)")
    add("--max-open", type=int, help="unanswered requests; what is due beyond is not sent (10000)")
    add("--seed", type=seed, help="of the times and of random values (0)")
    add("--out", type=Path, help="add the figures as a row, with the histogram, to this file")
    add("--json", action="store_true", help="print the row")
    add_config(sub)


def _load(arguments: argparse.Namespace) -> None:
    from codedinvnet.load.options import LoadOptions
    from codedinvnet.load.run import run_load

    run_load(settings_of(arguments, LoadOptions))
