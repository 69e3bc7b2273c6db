"""The command `gateway`."""

from __future__ import annotations

import argparse
from pathlib import Path

from codedinvnet.cli.common import Commands, add_command, add_face_options
from codedinvnet.cli.options import add_config, settings_of
from codedinvnet.codes.rules import SMALL_BACKUP


def add_commands(commands: Commands) -> None:
    """Add `gateway`; the names of its options are the fields of `GatewayOptions`."""
    sub = add_command(
        commands,
        "gateway",
        _gateway,
        "stand before servers of the Open Inference Protocol V2 (Triton, KServe, MLServer), and "
        "make up for slow and dead ones",
        "codedinvnet gateway resnet --upstream http://a:8000 --upstream grpc://b:8001 --port 9000 "
        "--grpc-port 9001",
    )
    sub.add_argument("name", nargs="?", help="the model that all upstreams have")
    add = sub.add_argument
    add(
        "--upstream",
        action="append",
        metavar="URL",
        help="a server: http://HOST:PORT, https://..., grpc://HOST:PORT or grpcs://...; each "
        "address of a name, resolved again and again: dns+http://NAME:PORT, dns+grpcs://... May be "
        "repeated",
    )
    add("--upstreams-file", type=Path, help="others, one a line; looked at while it runs (none)")
    add("--slots", type=int, help="requests that an upstream is at, at most (4)")
    add(
        "--policy",
        help=f"uncoded, replicate or hedge; with a backup auto, {SMALL_BACKUP} or "
        f"{SMALL_BACKUP}+hedge; with a code auto, coded or coded+hedge (hedge; auto with a backup; "
        "coded with a code)",
    )
    add(
        "--protection",
        type=Path,
        help="folder that `codedinvnet protect` wrote for the upstreams' model; its small backup "
        "runs here (none)",
    )
    add(
        "--backup-upstream",
        metavar="URL",
        help="a smaller model on a server of its own, http://HOST:PORT/v2/models/NAME, or grpc:// "
        "likewise (none)",
    )
    add("--backup-workers", type=int, help="processes for the protection's small backup (1)")
    add(
        "--method",
        help="a method of the protection's table (the recommended one); or a code that needs no "
        "training, by its name or as FILE.py:CLASS (none)",
    )
    add(
        "--k", type=int, help="queries in a group (10; of a code one less than there are upstreams)"
    )
    add(
        "--scores",
        metavar="NAME[:probabilities]",
        help="the output with the class scores, where it cannot be found",
    )
    add(
        "--input",
        action="append",
        dest="inputs",
        metavar="NAME:DATATYPE:SHAPE",
        help="an input whose shape the upstreams leave open, as x:FP32:3x32x32. May be repeated",
    )
    add(
        "--max-disagreement",
        type=float,
        help="release approximate answers while at most this share of them differs from the "
        "model's own; needs a calibrated --protection (none: all)",
    )
    add("--deadline-ms", type=float, help="until a request fails (5000)")
    add(
        "--hang-timeout-ms",
        type=float,
        help="until a request may be sent elsewhere (0.6 of the deadline, at least 1000)",
    )
    add(
        "--cancel",
        action="store_true",
        help="tell upstreams over gRPC by when an answer is needed, and to stop when none is; "
        "some versions of Triton crash of it",
    )
    add(
        "--max-pending",
        type=int,
        help="unanswered requests before 503 (200 a slot, at least 2000; with dns+ or "
        "--upstreams-file the slots of 32 upstreams count, or of as many as start)",
    )
    add("--tls-cert", type=Path, help="certificate of both ports, PEM (none: without TLS)")
    add("--tls-key", type=Path, help="its key, PEM, without a password")
    add("--upstream-ca", type=Path, help="certificates to trust, PEM (those of this machine)")
    add(
        "--upstream-token-file",
        type=Path,
        help="the token in this file goes to all upstreams, as 'Authorization: Bearer ...'; it is "
        "read again when it changes (none: what clients send)",
    )
    add(
        "--max-body",
        type=float,
        help="MiB of one request, at most (64)",
    )
    add_face_options(sub)
    add_config(sub)


def _gateway(arguments: argparse.Namespace) -> None:
    from codedinvnet.serving.gateway.options import GatewayOptions
    from codedinvnet.serving.gateway.run import run_gateway

    run_gateway(settings_of(arguments, GatewayOptions))
