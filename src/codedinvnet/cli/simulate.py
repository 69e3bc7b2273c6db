"""The commands that simulate: `simulate` and `plan`."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from codedinvnet.cli.common import Commands, add_command

POLICY = (
    "uncoded, replicate, hedge, coded, coded+hedge, coded by a method: its name, or FILE.py:CLASS, "
    " METHOD+hedge, auto, or auto+METHOD"
)
STRAGGLERS = (
    "none, held, exponential, pareto, slower, bursts, hung, or a faults file without corrupt, "
    "from_task, until_task and each_image"
)


def add_commands(commands: Commands) -> None:
    """Add both commands; the names of their options are the arguments of their functions."""
    _add_simulate(commands)
    _add_plan(commands)


def _add_simulate(commands: Commands) -> None:
    sub = add_command(
        commands,
        "simulate",
        _simulate,
        "simulate the service with its own rules, at any number of workers",
        "codedinvnet simulate configs/bench/simulate-pareto.json --policy hedge --workers 1000",
    )
    sub.add_argument("scenario", type=Path, help="scenario (JSON; see configs/bench)")
    add = sub.add_argument
    add("--policy", help=f"{POLICY} (the scenario's)")
    add("--workers", type=int, help="number of workers (the scenario's)")
    add("--k", type=int, help="queries in a coding group (the scenario's)")
    add("--r", type=int, help="parity queries in a coding group (the scenario's)")
    add("--qps", type=float, help="images a second (the scenario's)")
    add("--batch", type=int, help="images of a request (the scenario's)")
    add("--worker-batch", type=int, help="data tasks of a call, as serve's (the scenario's)")
    add("--extra", type=float, help="extra work per query, at most, as serve's (the scenario's)")
    add("--queries", type=int, help="images in all (the scenario's)")
    add("--seed", type=int, help="random seed (the scenario's)")
    add("--stragglers", help=f"{STRAGGLERS} (the scenario's)")
    add("--json", action="store_true", help="print one JSON object")


def _add_plan(commands: Commands) -> None:
    sub = add_command(
        commands,
        "plan",
        _plan,
        "compare policies on numbers of machines for a latency log or a scenario, by simulation",
        "codedinvnet plan log.csv --qps 200 --p999-ms 150",
    )
    sub.add_argument(
        "source",
        type=Path,
        help="latency log (.csv with a line worker,ms for each task: from when the worker began it "
        "to when it ended, without waiting) or scenario (.json)",
    )
    add = sub.add_argument
    add("--qps", type=float, help="images a second (the scenario's)")
    add("--p999-ms", type=float, help="target: what p99.9 of the latencies may be, in ms")
    add(
        "--workers",
        action="append",
        type=int,
        default=[],
        help="number of machines, repeatable (with a target the fewest that meet it, else numbers "
        "that are 80 to 20 %% busy)",
    )
    add(
        "--policy",
        action="append",
        default=[],
        help=f"{POLICY}; repeatable (uncoded, replicate, hedge, small-backup, small-backup+hedge "
        "and auto, with a bundle also coded and coded+hedge)",
    )
    add("--k", type=int, help="queries in a coding group, and 1/k may be copied (10)")
    add("--bundle", help="bundle whose code is compared as well (the scenario's)")
    add("--encode-ms", type=float, help="encoding, for each image of a group (the scenario's)")
    add("--stragglers", help=f"{STRAGGLERS} (those of the log or the scenario)")
    add("--batch", type=int, help="images of a request (the scenario's, or 1)")
    add("--extra", type=float, help="extra work per query, at most, as serve's (its own)")
    add("--deadline-ms", type=float, help="as serve's (5000)")
    add("--hang-timeout-ms", type=float, help="as serve's (0.6 of the deadline, at least 1000)")
    add("--queries", type=int, help="images of a run (those of 53000 requests)")
    add("--seed", type=int, help="random seed (0)")
    add("--out", type=Path, help="write the scenario, for simulate")
    add("--json", action="store_true", help="print one JSON object")


def _simulate(arguments: argparse.Namespace) -> None:
    from codedinvnet.simulation.run import run_simulate

    _show(arguments, run_simulate(**_options(arguments)))


def _plan(arguments: argparse.Namespace) -> None:
    from codedinvnet.simulation.compare import run_plan

    _show(arguments, run_plan(**_options(arguments)))


def _options(arguments: argparse.Namespace) -> dict[str, Any]:
    return {key: value for key, value in vars(arguments).items() if key not in ("run", "json")}


def _show(arguments: argparse.Namespace, found: tuple[dict[str, Any], list[str]]) -> None:
    """Print a report or its lines."""
    report, lines = found
    print(json.dumps(report) if arguments.json else "\n".join(lines))
