"""The command line of this repository's own benchmarks: `python -m benchmarks`.

Each is a module with a function `run`, whose parameters are its options. It returns a report: rows
or figures, and perhaps a table of them.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

from benchmarks import INSTALL
from codedinvnet.cli.common import add_command, guarded, print_report, seed
from codedinvnet.common.errors import UserError
from codedinvnet.common.grid import refuse_failures

MODELS = ("digits-mlp", "digits-boosted", "resnet20", "resnet32", "resnet56")
"""The rows of `protected`."""


def count(text: str) -> int:
    """Parse a number that must be at least 1."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {text}")
    return value


def main(argv: Sequence[str] | None = None) -> int:
    """Run `python -m benchmarks`; return the exit code."""
    arguments = build_parser().parse_args(argv)
    return guarded(lambda: run(arguments), "finished rows are kept: the same command goes on")


def build_parser() -> argparse.ArgumentParser:
    """Build the parser of `python -m benchmarks` with all its benchmarks."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description="Measure what this repository states of its own design.",
        epilog="run it in the repository's root; `codedinvnet bench` compares all methods, and\n"
        "`python -m benchmarks figures` renders what was measured",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    benches = parser.add_subparsers(
        title="benchmarks", required=True, metavar="BENCHMARK", dest="benchmark"
    )

    def benchmark(name: str, summary: str, example: str) -> Callable[..., argparse.Action]:
        example = f"python -m benchmarks {name} {example}"
        sub = add_command(benches, name, run, summary, example)
        sub.add_argument("--json", action="store_true", help="print one JSON object")
        return sub.add_argument

    def quick(add: Callable[..., argparse.Action]) -> None:
        add("--quick", action="store_true", help="a short version, rough figures")

    only = "only these cells, such as %s; repeatable (all)"
    add = benchmark(
        "peers",
        "measure the tail latency of proxies in front of the same slow, stopped and killed servers",
        "--quick",
    )
    quick(add)
    add("--several", action="store_true", help="one, two and four instances, members too")
    add("--only", action="append", default=[], metavar="KEY=VALUE", help=only % "peer=nginx")
    add("--seeds", type=count, help="how many seeds (3; 1 with --quick)")
    add("--requests", type=count, help="of each trial (8000; 2000 with --quick)")
    rows = "rows, JSON Lines; finished ones in it are kept"
    add("--out", type=Path, default=Path("peers.jsonl"), help=rows)

    add = benchmark(
        "figures",
        "write the tables and pictures of the pages from the rows in docs/results",
        "mnist --data-dir data",
    )
    add("bundle", nargs="*", help="bundles to measure before (all)")
    add("--data-dir", type=Path, help="measure, half an hour, on the image sets in this folder")
    add("--measure", action="store_true", help="measure on images from the usual places")
    add("--costs", action="store_true", help="measure the times alone, on a quiet machine")

    add = benchmark(
        "pictures",
        "draw the pictures of the documents that explain, and measure nothing",
        "--out pictures",
    )
    folder = Path("docs/images")
    add("--out", type=Path, default=folder, help="the folder to draw into (%(default)s)")

    add = benchmark(
        "processor",
        "measure the processor time of a request in the front end of serve, and in the gateway",
        "--tree . ../before",
    )
    add("--tree", type=Path, nargs="+", default=[Path()], help="checkouts to compare (this one)")
    add("--requests", type=count, default=1000, help="of each of five rounds (1000)")
    add("--members", action="store_true", help="one gateway, two processes, two members")

    add = benchmark(
        "sweep",
        "simulate every policy at every load under every straggler model",
        "configs/bench/simulate-auto.json --only load=0.4 --out results/auto.jsonl",
    )
    quick(add)
    add("sweep", type=Path, help="a scenario and what is varied in it (JSON)")
    add("--only", action="append", default=[], metavar="KEY=VALUE", help=only % "policy=hedge")
    add("--out", type=Path, required=True, help=rows)

    add = benchmark(
        "frontier",
        "train networks f alike, and compare how accurate and how codable they are",
        "configs/bench/frontier.json --data-dir data --out docs/results/frontier.jsonl",
    )
    add("points", type=Path, help="settings of one training, and networks to put in (JSON)")
    add("--only", action="append", default=[], metavar="KEY=VALUE", help=only % "f=i-RevNet")
    add("--data-dir", type=Path, help="folder of image sets (the cache, or a download)")
    add("--save-dir", type=Path, default=Path("runs"), help="where trainings are kept (runs)")
    add("--out", type=Path, default=Path("frontier.jsonl"), help=rows)

    add = benchmark(
        "tuning",
        "halve and double each number of the scheduler in the simulator, and switch rules off",
        "worth bucket --seeds 3",
    )
    add("numbers", nargs="*", metavar="number", help="of Tuning (all, and the rules)")
    add("--seeds", type=count, default=2, help="of each cell (2)")
    add("--queries", type=count, default=4000, help="of each run (4000)")

    add = benchmark(
        "sessions",
        "measure proxies in front of replicas that cache the beginnings of prompts",
        "--quick --out sessions.jsonl",
    )
    quick(add)
    add("--peer", nargs="+", help="contenders (those that the page shows; three with --quick)")
    add("--only", action="append", default=[], metavar="KEY=VALUE", help=only % "fault=slow")
    add("--seeds", type=count, help="how many seeds (3; 1 with --quick)")
    add("--out", type=Path, default=Path("sessions.jsonl"), help=rows)

    add = benchmark(
        "proxy",
        "count what clients see of failing replicas, stops and stalls, through each proxy",
        "--peer gateway haproxy envoy --only 429 stream",
    )
    add("--peer", nargs="+", help="gateway, haproxy, envoy, or contenders of peers (the first two)")
    add("--only", nargs="+", default=[], metavar="WORD", help="situations with one of these words")

    add = benchmark(
        "protected",
        "protect a model as users have it, and print the table of all rows in docs/results/protect",
        "resnet20 --source data/cifar10 --out runs/resnet20",
    )
    model = "the model: %(choices)s (none: the table only)"
    add("row", nargs="?", choices=MODELS, metavar="row", help=model)
    source = "folder with CIFAR-10's train.npz"
    add("--source", type=Path, help=source)
    add("--out", type=Path, help="folder for model and protection (none)")
    add("--minutes", type=float, default=30.0, help="of codedinvnet protect (30)")

    add = benchmark(
        "load",
        "send an HTTP server requests at Poisson times, and report the percentiles of its latency",
        "http://127.0.0.1:8000/v2/models/mnist/infer --body request.json --rate 50",
    )
    add("url", help="URL of every request")
    add("--body", type=Path, help="file with the JSON to POST (GET without it)")
    add("--rate", type=float, default=10.0, help="requests a second (10)")
    add("--seconds", type=float, default=30.0, help="duration of the load (30)")
    add("--seed", type=seed, default=0, help="of the arrivals (0)")
    return parser


def run(arguments: argparse.Namespace) -> None:
    """Run a benchmark, and print its table, its rows, or its figures.

    Raises:
        UserError: if it cannot be run, or in the end if one of its rows has an error.
    """
    options = dict(vars(arguments))
    name, as_json = options.pop("benchmark"), options.pop("json")
    del options["run"]
    try:
        report: dict[str, Any] = import_module(f"benchmarks.{name}").run(**options)
    except ModuleNotFoundError as error:
        raise UserError(f"{error.name} is missing: {INSTALL}") from error
    table, rows = report.pop("table", None), report.get("rows", [])
    if as_json:
        print(json.dumps(report))
    elif table is not None:
        print(table)
    else:
        for row in rows or [report]:
            print_report(row, as_json=False)
            print()
    failed = sum(row.get("error") is not None for row in rows)
    refuse_failures(failed, "of the trials", Path(options.get("out") or ""))
