"""The command line of this repository's own benchmarks: a table of them and of their options.

Each is a module with a function `run`, whose parameters are the options. It returns a report: rows,
or figures, and perhaps a table of them for people.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from codedinvnet.cli.common import add_command, guarded, print_report, seed
from codedinvnet.evaluation.grid import refuse_failures

Options = Mapping[str, Mapping[str, Any]]


def count(text: str) -> int:
    """Parse a number of things, of which there must be one at least."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {text}")
    return value


def number(default: int, help: str) -> dict[str, Any]:
    """Return what argparse is told of a number of things."""
    return {"type": count, "default": default, "help": f"{help} (%(default)s)"}


QUICK: Options = {"--quick": {"action": "store_true", "help": "a short version, rough figures"}}
DATA: Options = {"--data-dir": {"type": Path, "help": "folder of image sets (the cache)"}}
SEED: Options = {"--seed": {"type": seed, "default": 0, "help": "of all that is drawn (0)"}}
BUNDLES: Options = {
    "bundles": {
        "nargs": "*",
        "default": ["mnist", "fashion"],
        "metavar": "bundle",
        "help": "calibrated bundles with guesses (mnist fashion)",
    }
}


def out(help: str, **more: Any) -> Options:
    """Return the option that names the file of rows."""
    return {"--out": {"type": Path, "help": help, **more}}


@dataclass(frozen=True)
class Benchmark:
    """One benchmark.

    Attributes:
        summary: what it does.
        example: the words behind its name in an example.
        options: what argparse is told of each option.
    """

    summary: str
    example: str
    options: Options


BENCHMARKS: Mapping[str, Benchmark] = {
    "gateway": Benchmark(
        "time requests to Triton through the gateway, compared with those without it",
        "--quick",
        QUICK,
    ),
    "peers": Benchmark(
        "measure the tail latency of proxies in front of the same slow, stopped and killed servers",
        "--quick",
        {
            **QUICK,
            "--peer": {"nargs": "+", "help": "contenders (all; five with --quick)"},
            "--fault": {"nargs": "+", "help": "faults (all; five with --quick)"},
            "--load": {"type": float, "nargs": "+", "help": "shares of capacity (0.4 0.7)"},
            "--slots": {
                "type": int,
                "nargs": "+",
                "default": [1],
                "help": "of each server, for contenders that must be told (1)",
            },
            "--servers": {"type": int, "nargs": "+", "default": [8], "help": "how many (8)"},
            "--seeds": {"type": count, "help": "how many seeds (3; 1 with --quick)"},
            "--requests": {"type": count, "help": "of each trial (8000; 3000 with --quick)"},
            "--bursty": {"action": "store_true", "help": "arrivals in bursts"},
            **out("rows, JSON Lines; finished ones in it are kept", default=Path("peers.jsonl")),
        },
    ),
    "outside": Benchmark(
        "harm a service and a gateway in every way known, and count what clients see",
        "--quick",
        {
            "--only": {"choices": ("serve", "gateway"), "help": "one of the two (both)"},
            **QUICK,
        },
    ),
    "trust": Benchmark(
        "check over random splits that released answers keep a limit on disagreement",
        "--data-dir data --json",
        {**BUNDLES, **DATA, **SEED, "--runs": number(200, "random splits")},
    ),
    "protected": Benchmark(
        "protect a model as users have it, and print the table of all rows in docs/results/protect",
        "lite0 --source imagenette --out runs/lite0",
        {
            "row": {
                "nargs": "?",
                "choices": [
                    *("digits-mlp", "digits-boosted", "resnet20", "resnet32", "resnet56"),
                    *("lite0", "magika"),
                ],
                "help": "the model: %(choices)s (none: the table only)",
                "metavar": "row",
            },
            "--source": {
                "type": Path,
                "help": "folder with CIFAR-10's train.npz, a clone of Imagenette, or files (this "
                "machine's)",
            },
            **out("folder for model and protection (none)"),
            "--minutes": {"type": float, "default": 30.0, "help": "of codedinvnet protect (30)"},
        },
    ),
    "load": Benchmark(
        "send an HTTP server requests at Poisson times, and report the percentiles of its latency",
        "http://127.0.0.1:8000/v2/models/mnist/infer --body request.json --rate 50",
        {
            "url": {"help": "URL of every request"},
            "--body": {"type": Path, "help": "file with the JSON to POST (GET without it)"},
            "--rate": {"type": float, "default": 10.0, "help": "requests a second (10)"},
            "--seconds": {"type": float, "default": 30.0, "help": "duration of the load (30)"},
            **SEED,
        },
    ),
    "scheduling": Benchmark(
        "measure what the front end costs a query, and the simulator a million",
        "--quick",
        QUICK,
    ),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run `python -m benchmarks`; return the exit code."""
    arguments = build_parser().parse_args(argv)
    resumes = hasattr(arguments, "save_dir")
    kept = "finished epochs and rows are kept: the same command goes on" if resumes else ""
    return guarded(lambda: arguments.run(arguments), kept)


def build_parser() -> argparse.ArgumentParser:
    """Build the parser of `python -m benchmarks` with all its benchmarks."""
    examples = [f"  python -m benchmarks {name} {one.example}" for name, one in BENCHMARKS.items()]
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description="Measure what this repository states of its own design.",
        epilog="\n".join(["examples:", *examples])
        + "\n\nrun it in the repository's root; `codedinvnet bench` compares all methods, and\n"
        "`python -m benchmarks.figures` renders what was measured",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    benches = parser.add_subparsers(
        title="benchmarks", required=True, metavar="BENCHMARK", dest="benchmark"
    )
    for name, one in BENCHMARKS.items():
        example = f"python -m benchmarks {name} {one.example}"
        sub = add_command(benches, name, run, one.summary, example)
        for option, told in one.options.items():
            sub.add_argument(option, **told)
        sub.add_argument("--json", action="store_true", help="print one JSON object")
    return parser


def run(arguments: argparse.Namespace) -> None:
    """Run a benchmark, and print its table, or its rows, or its figures.

    Raises:
        UserError: if it cannot be run; when all is printed, if one of its rows has an error.
    """
    options = dict(vars(arguments))
    name, as_json = options.pop("benchmark"), options.pop("json")
    del options["run"]
    module = import_module(f"benchmarks.{name.replace('-', '_')}")
    report: dict[str, Any] = module.run(**options)
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
