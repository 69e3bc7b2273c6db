"""The commands that serve, `serve` and `gateway`, and `policy`, on one that runs."""

from __future__ import annotations

import argparse
from pathlib import Path

from codedinvnet.cli.common import Commands, add_command
from codedinvnet.cli.options import add_options, options_of
from codedinvnet.common.errors import UserError


def add_commands(commands: Commands) -> None:
    """Add the commands; options of the first two are the fields of their option models."""
    from codedinvnet.gateway.options import GatewayOptions
    from codedinvnet.serving.config import ServeOptions

    sub = add_command(
        commands,
        "serve",
        _serve,
        "serve a model over HTTP (Open Inference Protocol V2), through slow and dead workers",
        "codedinvnet serve mnist --k 10 --policy coded --demo",
    )
    add_options(sub, ServeOptions)
    sub = add_command(
        commands,
        "gateway",
        _gateway,
        "hedge any service that speaks HTTP: send late requests to a second server, avoid slow "
        "servers, and replace dead ones",
        "codedinvnet gateway --upstream http://a:8000 --upstream http://b:8000 --port 9000",
    )
    add_options(sub, GatewayOptions)
    sub = add_command(
        commands,
        "policy",
        _policy,
        "show the policy of a running service or gateway, or change it without losing a query",
        "codedinvnet policy http://127.0.0.1:8000 hedge",
    )
    sub.add_argument("url", help="address of the service, such as http://127.0.0.1:8000")
    sub.add_argument(
        "--token-file", type=Path, help="file with the service's token (default: none)"
    )
    sub.add_argument("policy", nargs="?", help="the new policy (default: show the current policy)")


def _serve(arguments: argparse.Namespace) -> None:
    from codedinvnet.serving.app import serve
    from codedinvnet.serving.config import ServeOptions

    serve(options_of(arguments, ServeOptions))


def _gateway(arguments: argparse.Namespace) -> None:
    from codedinvnet.gateway.options import GatewayOptions
    from codedinvnet.gateway.run import run_gateway

    run_gateway(options_of(arguments, GatewayOptions))


def _policy(arguments: argparse.Namespace) -> None:
    from codedinvnet.net.admin_client import ask, read_token

    token = read_token(arguments.token_file)
    before = ask(arguments.url, "/policy", token)
    if "offered" not in before:  # a gateway passes this on to an upstream
        raise UserError(f"{arguments.url}: no policy here; a gateway's is at URL/codedinvnet")
    if arguments.policy is None:
        for name in before["offered"]:
            print(f"{'*' if name == before['policy'] else ' '} {name}")
        for name, why in before["refused"].items():
            print(f"  not {name}: {why}")
        if before["method"] is not None:
            print(f"method: {before['method']}")
        return
    found = ask(arguments.url, "/policy", token, {"policy": arguments.policy})
    print(f"policy {found['policy']}, before {before['policy']}")
