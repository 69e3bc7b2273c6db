"""The command `gateway`."""

from __future__ import annotations

import argparse
from pathlib import Path

from codedinvnet.cli.common import Commands, add_command
from codedinvnet.cli.options import add_config, settings_of


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
        "address of a name, resolved again and again: dns+http://NAME:PORT, dns+grpc://... May be "
        "repeated",
    )
    add("--upstreams-file", type=Path, help="others, one a line; looked at while it runs (none)")
    add("--slots", type=int, help="requests that an upstream is at, at most (4)")
    add(
        "--policy",
        help="uncoded, replicate or hedge; with a backup auto, small-backup or small-backup+hedge; "
        "with a code coded, coded+hedge or auto (hedge; auto with a backup; coded with a code)",
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
        "training, such as approxifer or FILE.py:CLASS (none)",
    )
    add(
        "--k", type=int, help="queries in a group (10; of a code one less than there are upstreams)"
    )
    add(
        "--max-disagreement",
        type=float,
        help="release approximate answers while at most this share of them differs from the "
        "model's own; needs a calibrated --protection (none: all)",
    )
    add("--group-timeout-ms", type=float, help="until a group is coded that is not full (20)")
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
    add("--routing", help="least-loaded or round-robin (least-loaded)")
    add("--host", help="address to listen on (127.0.0.1)")
    add("--port", type=int, help="port; 0: a free one (8000)")
    add("--grpc-port", type=int, help="port of the protocol over gRPC; 0: a free one (none)")
    add(
        "--allowed-host",
        action="append",
        help="another name that clients may call the gateway by (Host header); *: any. May be "
        "repeated",
    )
    add("--deadline-ms", type=float, help="until a request fails (5000)")
    add(
        "--hang-timeout-ms",
        type=float,
        help="until a request is sent elsewhere (0.6 of the deadline, 1000 to 3000)",
    )
    add(
        "--cancel",
        action="store_true",
        help="tell upstreams over gRPC by when an answer is needed, and to stop when none is; "
        "some versions of Triton crash of it",
    )
    add(
        "--down-timeout-ms",
        type=float,
        help="without any upstream until /v2/health/live fails (30000)",
    )
    add(
        "--max-pending",
        type=int,
        help="unanswered requests before 503 (200 a slot, at least 2000)",
    )
    add(
        "--max-body-memory",
        type=float,
        help="MiB of all requests that are here, before 503 (512)",
    )
    add("--token-file", type=Path, help="clients must send the token in this file (none)")
    add("--tls-cert", type=Path, help="certificate of both ports, PEM (none: without TLS)")
    add("--tls-key", type=Path, help="its key, PEM, without a password")
    add("--upstream-ca", type=Path, help="certificates to trust, PEM (those of this machine)")
    add(
        "--traces",
        metavar="URL",
        help="send OpenTelemetry traces to this collector, http://HOST:4318; OTEL_* variables say "
        "the rest (none)",
    )
    add_config(sub)


def _gateway(arguments: argparse.Namespace) -> None:
    from codedinvnet.serving.gateway.options import GatewayOptions
    from codedinvnet.serving.gateway.run import run_gateway

    run_gateway(settings_of(arguments, GatewayOptions))
