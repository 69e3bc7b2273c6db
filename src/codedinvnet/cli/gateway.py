"""The command `gateway`."""

from __future__ import annotations

import argparse

from codedinvnet.cli.common import Commands, add_command
from codedinvnet.cli.options import add_options, options_of


def add_commands(commands: Commands) -> None:
    """Add `gateway`; its options are the fields of `GatewayOptions`."""
    from codedinvnet.gateway.options import GatewayOptions

    sub = add_command(
        commands,
        "gateway",
        _gateway,
        "hedge any service that speaks HTTP: send late requests to a second server, avoid slow "
        "servers, and replace dead ones",
        "codedinvnet gateway --upstream http://a:8000 --upstream http://b:8000 --port 9000",
    )
    add_options(sub, GatewayOptions)


def _gateway(arguments: argparse.Namespace) -> None:
    from codedinvnet.gateway.options import GatewayOptions
    from codedinvnet.gateway.run import run_gateway

    run_gateway(options_of(arguments, GatewayOptions))
