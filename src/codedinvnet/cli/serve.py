"""The command `serve`."""

from __future__ import annotations

import argparse
from pathlib import Path

from codedinvnet.cli.common import Commands, add_command, add_face_options, add_model_options
from codedinvnet.cli.options import add_config, settings_of
from codedinvnet.engines import ENGINES


def add_commands(commands: Commands) -> None:
    """Add `serve`; the names of its options are the fields of `ServeOptions`."""
    sub = add_command(
        commands,
        "serve",
        _serve,
        "serve a model over HTTP (Open Inference Protocol V2), through slow and dead workers",
        "codedinvnet serve mnist --k 10 --policy coded --demo",
    )
    sub.add_argument(
        "source",
        nargs="?",
        help="name of a shipped bundle, a bundle's folder, FILE.onnx, or "
        "package.module:function, which makes a torch.nn.Module",
    )
    add = sub.add_argument
    add_model_options(sub)
    add("--name", help="what requests call a model of your own (its file or function)")
    add(
        "--k",
        type=int,
        help="queries in a group, 2 to 10 of shipped bundles (10; a --protection has its own)",
    )
    add(
        "--workers",
        type=int,
        help="worker processes (as many as a group has tasks, k + 1; without a code one a "
        "processor, at least 2)",
    )
    add(
        "--method",
        help="what makes up for missing answers: a method of docs/reference/methods.md, or one "
        "of your own, FILE.py:CLASS (of a bundle with auto the small backup beside it, if there is "
        "one, else Coded-InvNet; of a model of your own none)",
    )
    add(
        "--protection",
        type=Path,
        help="folder that `codedinvnet protect` wrote for this model; --method then is one of its "
        "table (the recommended one)",
    )
    add(
        "--part",
        type=Path,
        help="the checkpoint that `bench accuracy` left for that method and k; of a method that "
        "is tuned its rows, for what it chose",
    )
    add(
        "--stragglers",
        type=int,
        help="outputs of a group that may be missing, of methods for any number (1)",
    )
    add(
        "--errors",
        type=int,
        help="outputs of a group that may be wrong, of methods that find them (1)",
    )
    add(
        "--policy",
        help="uncoded, replicate, hedge, coded, coded+hedge, coded+guess, a method, "
        "METHOD+hedge, or auto, which decides by what it measures (auto; coded with a --method)",
    )
    add(
        "--worker-batch",
        type=int,
        help="queries that a worker computes in one call, at most, when they wait (1); more where "
        "a call of several takes less than as many calls, as on a GPU",
    )
    add(
        "--extra",
        type=float,
        help="extra work per query, at most: copies, parities and backups, in service times, as "
        "0.1 (0.2 of auto; of others 1/k of copies, and all that their code sends)",
    )
    add("--pool", help="local processes, ray, or FILE.py:CLASS (local)")
    add("--ray-address", help="a running Ray cluster; without it, one is started here")
    add("--device", help="of the workers: cpu, cuda, cuda:1 (cpu)")
    add("--threads-per-worker", type=int, help="threads of a worker (1)")
    add(
        "--engine",
        help=f"what computes the networks: {' or '.join(ENGINES)}; ONNX Runtime is the faster one "
        "on processors, and its first start takes some seconds longer (pytorch; onnxruntime for "
        "FILE.onnx)",
    )
    add("--deadline-ms", type=float, help="until a query is guessed, or fails (5000)")
    add(
        "--hang-timeout-ms",
        type=float,
        help="until a silent worker goes (0.6 of the deadline, at least 1000)",
    )
    add(
        "--min-confidence",
        type=float,
        help="coded+hedge: check decoded answers below it by a copy (0)",
    )
    add(
        "--max-disagreement",
        type=float,
        help="of approximate answers only so many may differ from direct ones, as 0.01; less sure "
        "ones wait (all are released)",
    )
    add(
        "--on-corruption",
        help="replace or report a worker that answers wrongly; needs a calibration (report)",
    )
    add(
        "--max-pending",
        type=int,
        help="unanswered queries before 503, even if they could be answered in time (200 a worker, "
        "at least 2000)",
    )
    add("--max-batch", type=int, help="queries of one request (256)")
    add("--faults", type=Path, help="inject the faults of this file (JSON), for experiments (none)")
    add("--demo", action="store_true", help="let the page send images and hurt workers")
    add_face_options(sub)
    add_config(sub)


def _serve(arguments: argparse.Namespace) -> None:
    from codedinvnet.serving.options import ServeOptions
    from codedinvnet.serving.serve import serve

    serve(settings_of(arguments, ServeOptions))
