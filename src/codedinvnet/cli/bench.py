"""The command `bench`, with a command of its own for each benchmark."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from codedinvnet.cli.common import Commands, add_command, flushing_denormals, print_report

EXAMPLES = """examples:
  codedinvnet bench accuracy configs/bench/accuracy.json --data-dir data
  codedinvnet bench latency --data-dir data --quick
"""


def add_commands(commands: Commands) -> None:
    """Add `bench` and its benchmarks."""
    summary = "compare all methods: their accuracy, and their latency in the real service"
    bench = commands.add_parser(
        "bench",
        help=summary,
        description=summary[0].upper() + summary[1:] + ".",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    benches = bench.add_subparsers(title="benchmarks", required=True, metavar="BENCHMARK")
    _add_accuracy(benches)
    _add_latency(benches)


def _add_accuracy(benches: Commands) -> None:
    sub = add_command(
        benches,
        "accuracy",
        _accuracy,
        "erase workers under every method of a grid; rows, tables and figures",
        "codedinvnet bench accuracy configs/bench/accuracy.json --data-dir data",
    )
    add = sub.add_argument
    add("grid", type=Path, help="methods, data sets, k, missing workers (JSON)")
    add("--dataset", action="append", default=[], help="only this one; repeatable (all)")
    add(
        "--method",
        action="append",
        default=[],
        help="only this method of the grid, or one that it does not name; repeatable (all)",
    )
    add(
        "--split",
        choices=("test", "validation"),
        default="test",
        help="which images to score on (test); while you choose, validation",
    )
    add("--device", default="auto", help="cpu, cuda, cuda:1 (auto)")
    _add_shared(sub, "accuracy", "minutes: short trainings, 1,000 images")


def _add_shared(sub: argparse.ArgumentParser, name: str, quick: str) -> None:
    """Add what both benchmarks take."""
    add = sub.add_argument
    add("--out", type=Path, help=f"rows; finished ones in it are kept (results/{name}.jsonl)")
    add("--save-dir", type=Path, default=Path("runs"), help="where trained parts lie (runs)")
    add("--quick", action="store_true", help=quick)
    add("--data-dir", type=Path, help="folder of image sets (the cache)")
    add("--download", action="store_true", help="download into --data-dir")
    add("--json", action="store_true", help="print one JSON object")


def _shared(arguments: argparse.Namespace, name: str) -> dict[str, Any]:
    """Return what both benchmarks take, as their functions have it."""
    name += "-quick" if arguments.quick else ""
    return {
        "out": arguments.out or Path("results") / f"{name}.jsonl",
        "save_dir": arguments.save_dir,
        "data_dir": arguments.data_dir,
        "download": arguments.download,
        "quick": arguments.quick,
    }


@flushing_denormals
def _accuracy(arguments: argparse.Namespace) -> None:
    from codedinvnet.evaluation import methods, plots, tables
    from codedinvnet.stages import choose_device

    validation = arguments.split == "validation"
    shared = _shared(arguments, "accuracy-validation" if validation else "accuracy")
    out = shared["out"]
    report = methods.run(
        arguments.grid,
        device=choose_device(arguments.device),
        only=arguments.dataset,
        methods=arguments.method,
        split=arguments.split,
        **shared,
    )
    written = [*tables.write_accuracy(out), *plots.draw_accuracy(out)]
    _tell(report, "trials", out, written, arguments.json)


def _add_latency(benches: Commands) -> None:
    sub = add_command(
        benches,
        "latency",
        _latency,
        "load the real service under every method of a grid; rows and tables",
        "codedinvnet bench latency --data-dir data --only batch=10 --only load=0.4",
    )
    add, grid = sub.add_argument, Path("configs/bench/latency.json")
    add("grid", nargs="?", type=Path, default=grid, help=f"methods, loads, stragglers ({grid})")
    add(
        "--only",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="only runs of this method, batch, load, stragglers or run; repeatable (all)",
    )
    log = Path("bench-latency.log")
    add("--log", type=Path, default=log, help=f"servers' log ({log})")
    _add_shared(sub, "latency", "minutes: one setting, 3,000 queries a method")


@flushing_denormals
def _latency(arguments: argparse.Namespace) -> None:
    from codedinvnet.evaluation import latency, tables

    shared = _shared(arguments, "latency")
    out = shared["out"]
    report = latency.run(arguments.grid, log=arguments.log, only=arguments.only, **shared)
    written = tables.write_latency(out)
    _tell(report, "runs", out, written, arguments.json)


def _tell(
    report: dict[str, Any], what: str, out: Path, written: Sequence[Path], as_json: bool
) -> None:
    """Print what was done of so many trials or runs, and what was written.

    Raises:
        UserError: then, if something failed.
    """
    from codedinvnet import study

    print_report({**report, "rows": str(out), "written": [str(p) for p in written]}, as_json)
    study.refuse_failures(report["failed"], f"of the {what}", out)
