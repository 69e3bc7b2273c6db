"""The commands that simulate: `simulate`, `plan` and `fit`."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from codedinvnet.cli.common import Commands, Once, add_command


def add_commands(commands: Commands) -> None:
    """Add `simulate`, `plan` and `fit`."""
    _add_simulate(commands)
    _add_plan(commands)
    _add_fit(commands)


def _add_simulate(commands: Commands) -> None:
    """Add `simulate`; the names of its options are the arguments of `run_simulate`."""
    sub = add_command(
        commands,
        "simulate",
        _simulate,
        "simulate the service with its own rules, at any number of workers",
        "codedinvnet simulate configs/bench/simulate-pareto.json --policy hedge --workers 1000",
    )
    sub.add_argument("scenario", type=Path, help="scenario or sweep (JSON; see configs/bench)")
    add = sub.add_argument
    add(
        "--policy",
        action=Once,
        help="uncoded, replicate, hedge, coded, coded+hedge, coded+guess, coded by a method: its "
        "name, or FILE.py:CLASS, METHOD+hedge, auto, or auto+METHOD (the scenario's)",
    )
    add("--workers", type=int, help="how many (the scenario's)")
    add("--k", type=int, help="queries in a coding group (the scenario's)")
    add("--r", type=int, help="parity queries in a coding group (the scenario's)")
    add("--qps", type=float, help="images a second (the scenario's)")
    add("--batch", type=int, help="images of a request (the scenario's)")
    add("--worker-batch", type=int, help="data tasks of a call, as serve's (the scenario's)")
    add("--extra", type=float, help="extra work per query, at most, as serve's (the scenario's)")
    add(
        "--queries",
        type=int,
        help="images in all; of --measured, requests of each run (the scenario's)",
    )
    add("--seed", type=int, help="of all draws (the scenario's)")
    add(
        "--stragglers",
        help="none, held, exponential, pareto, slower, bursts, hung, or a faults file without "
        "corrupt, from_task, until_task and each_image",
    )
    add("--max-disagreement", type=float, help="as serve's, by the bundle's calibration (none)")
    add("--measured", type=Path, help="repeat these measured runs (JSONL) and compare")
    add(
        "--out",
        type=Path,
        help="of a sweep: its rows (JSONL), those that are there are kept; of --measured: "
        "the comparison (JSON)",
    )
    add("--picture", type=Path, help="of a sweep: draw the map of p99.9 by load")
    add("--quick", action="store_true", help="of a sweep: 2,000 images a place at most")
    add("--json", action="store_true", help="print one JSON object")


def _add_plan(commands: Commands) -> None:
    """Add `plan`; the names of its options are the fields of `PlanOptions`."""
    sub = add_command(
        commands,
        "plan",
        _plan,
        "find the method, k and r that meet a target with the fewest workers, by simulation",
        "codedinvnet plan mnist --qps 500 --p999-ms 150 --min-accuracy 0.97",
    )
    sub.add_argument(
        "bundle",
        help="name of a shipped bundle, or a folder: its accuracy counts, if --scenario has none, "
        "or names another bundle",
    )
    add = sub.add_argument
    add("--qps", type=float, required=True, help="images a second")
    add("--p999-ms", type=float, required=True, help="what p99.9 of the latencies may be")
    add("--min-accuracy", type=float, default=0.0, help="least overall accuracy, in 0..1 (0)")
    add("--scenario", type=Path, help="arrivals, times and stragglers (JSON; see configs/bench)")
    add("--accuracy-rows", type=Path, help="of bench accuracy (JSONL): they tell methods' accuracy")
    add("--service-ms", type=float, help="to embed an image (the scenario's, else measured here)")
    add("--encode-ms", type=float, help="to encode, each image of a group (likewise)")
    add(
        "--stragglers",
        help="none, held, exponential, pareto, slower, bursts, hung, or a faults file without "
        "corrupt, from_task, until_task and each_image (the scenario's, else pareto)",
    )
    add("--batch", type=int, help="images of a request (the scenario's, else 1)")
    add(
        "--extra",
        type=float,
        help="extra work per query, at most, as serve's (the scenario's, else what suits each)",
    )
    add("--deadline-ms", type=float, help="as serve's (the scenario's, else 5000)")
    add(
        "--hang-timeout-ms",
        type=float,
        help="as serve's (the scenario's, else 0.6 of the deadline, at least 1000)",
    )
    add("--max-disagreement", type=float, help="as serve's, by the bundle's calibration (none)")
    add(
        "--policy",
        action="append",
        default=[],
        help="only this policy, of those of `simulate --policy`; repeatable",
    )
    add(
        "--k",
        action="append",
        type=int,
        default=[],
        help="only this k, of codes up to the largest measured; repeatable",
    )
    add(
        "--queries",
        type=int,
        help="images in the longest run of each candidate (the scenario's, else those of 53000 "
        "requests)",
    )
    add("--seed", type=int, help="of all draws (the scenario's, else 0)")
    add("--json", action="store_true", help="print one JSON object")


def _add_fit(commands: Commands) -> None:
    """Add `fit`; the names of its options are the arguments of `run_fit`."""
    sub = add_command(
        commands,
        "fit",
        _fit,
        "fit a scenario's service times and stragglers to what a service's tasks took",
        "codedinvnet fit log.csv --out scenario.json --bundle mnist --picture fit.png",
    )
    add = sub.add_argument
    add(
        "times",
        type=Path,
        help="latency log, CSV with a line worker,ms for each task: ms is from when the worker "
        "began it to when it ended, without waiting",
    )
    add("--out", type=Path, required=True, help="the scenario, for simulate and plan --scenario")
    add("--bundle", help="whose code and accuracy the scenario has (those of --scenario)")
    add(
        "--scenario",
        type=Path,
        help="scenario whose other settings are kept (JSON; see configs/bench)",
    )
    add("--picture", type=Path, help="draw measured and fitted times (.png, .pdf or .svg)")
    add("--json", action="store_true", help="print one JSON object")


def _simulate(arguments: argparse.Namespace) -> None:
    from codedinvnet.simulation.run import run_simulate

    _tell(arguments, run_simulate(**_options(arguments)))


def _plan(arguments: argparse.Namespace) -> None:
    from codedinvnet.simulation.run import PlanOptions, run_plan

    repeated = {"policy": tuple(arguments.policy), "k": tuple(arguments.k)}
    _tell(arguments, run_plan(PlanOptions(**_options(arguments) | repeated)))


def _fit(arguments: argparse.Namespace) -> None:
    from codedinvnet.simulation.fit_run import run_fit

    _tell(arguments, run_fit(**_options(arguments)))


def _options(arguments: argparse.Namespace) -> dict[str, Any]:
    return {key: value for key, value in vars(arguments).items() if key not in ("run", "json")}


def _tell(arguments: argparse.Namespace, found: tuple[dict[str, Any], list[str]]) -> None:
    """Print a report or its lines."""
    report, lines = found
    print(json.dumps(report) if arguments.json else "\n".join(lines))
