"""The commands on a running service: `policy` and `advise`."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from codedinvnet.cli.common import Commands, add_command, seed

FEWEST_QUERIES = 2000
"""To simulate, of each policy."""


def add_commands(commands: Commands) -> None:
    """Add both commands."""
    sub = add_command(
        commands,
        "policy",
        _policy,
        "show the policy of a running service or gateway, or change it without losing a query",
        "codedinvnet policy http://127.0.0.1:8000 hedge",
    )
    _add_service(sub)
    sub.add_argument("policy", nargs="?", help="the policy to go on by (none: show what there is)")

    sub = add_command(
        commands,
        "advise",
        _advise,
        "say what each policy would give a running service or gateway, by what it has seen lately",
        "codedinvnet advise http://127.0.0.1:8000",
    )
    _add_service(sub)
    add = sub.add_argument
    add("--by", choices=("p50", "p99", "p999"), default="p99", help="what is to be low (p99)")
    add("--seconds", type=float, help="what is older than that is left out (all that it keeps)")
    add("--extra", type=float, help="extra work per query, at most, as serve's (the service's)")
    add("--queries", type=int, default=60_000, help="to simulate for each policy (60000)")
    add("--seed", type=seed, default=0, help="of all draws (0)")
    add("--json", action="store_true", help="print one JSON object")


def _add_service(sub: argparse.ArgumentParser) -> None:
    """Add what a command that asks a running service takes."""
    sub.add_argument("url", help="address of the service, such as http://127.0.0.1:8000")
    sub.add_argument("--token-file", type=Path, help="the file with the service's token (none)")


def _advise(arguments: argparse.Namespace) -> None:
    from codedinvnet.asking import ask, read_token
    from codedinvnet.errors import UserError
    from codedinvnet.serving.policies import check_extra
    from codedinvnet.simulation.advise import AdviseOptions, advise, lines

    if arguments.queries < FEWEST_QUERIES:
        raise UserError(f"--queries: must be at least {FEWEST_QUERIES}, got {arguments.queries}")
    if arguments.seconds is not None and not arguments.seconds > 0:
        raise UserError(f"--seconds: must be above 0, got {arguments.seconds}")
    check_extra(arguments.extra)
    token = read_token(arguments.token_file)
    options = AdviseOptions(
        arguments.url,
        arguments.by,
        arguments.queries,
        arguments.seconds,
        arguments.seed,
        str(arguments.token_file or ""),
        arguments.extra,
    )
    report = advise(ask(arguments.url, "/traffic", token), options, progress=True)
    print(json.dumps(report) if arguments.json else "\n".join(lines(report, options)))


def _policy(arguments: argparse.Namespace) -> None:
    from codedinvnet.asking import ask, read_token

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
