"""The command on a running service: `policy`."""

from __future__ import annotations

import argparse
from pathlib import Path

from codedinvnet.cli.common import Commands, add_command


def add_commands(commands: Commands) -> None:
    """Add `policy`."""
    sub = add_command(
        commands,
        "policy",
        _policy,
        "show the policy of a running service or gateway, or change it without losing a query",
        "codedinvnet policy http://127.0.0.1:8000 hedge",
    )
    sub.add_argument("url", help="address of the service, such as http://127.0.0.1:8000")
    sub.add_argument("--token-file", type=Path, help="file with the service's token (none)")
    sub.add_argument("policy", nargs="?", help="the policy to go on by (none: show what there is)")


def _policy(arguments: argparse.Namespace) -> None:
    from codedinvnet.admin_client import ask, read_token

    token = read_token(arguments.token_file)
    before = ask(arguments.url, "/policy", token)
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
