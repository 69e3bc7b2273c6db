"""The command `bench`, with a command of its own for each benchmark."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from codedinvnet.cli.common import Commands, add_command, print_report

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
    sub.add_argument("grid", type=Path, help="methods, data sets, k, missing workers (JSON)")
    sub.add_argument(
        "--out",
        type=Path,
        help="rows; finished ones in it are kept (results/accuracy.jsonl)",
    )
    sub.add_argument(
        "--save-dir", type=Path, default=Path("runs"), help="where trained parts lie (runs)"
    )
    sub.add_argument(
        "--dataset", action="append", default=[], help="only this one; repeatable (all)"
    )
    sub.add_argument(
        "--method",
        action="append",
        default=[],
        help="only this method of the grid, or one that it does not name; repeatable (all)",
    )
    sub.add_argument("--quick", action="store_true", help="minutes: short trainings, 1,000 images")
    sub.add_argument("--data-dir", type=Path, help="folder of image sets (the cache)")
    sub.add_argument("--download", action="store_true", help="download into --data-dir")
    sub.add_argument("--device", default="auto", help="cpu, cuda, cuda:1 (auto)")
    sub.add_argument("--json", action="store_true", help="print one JSON object")


def _accuracy(arguments: argparse.Namespace) -> None:
    from codedinvnet.bench import accuracy, plots, tables
    from codedinvnet.stages import choose_device

    name = "accuracy-quick" if arguments.quick else "accuracy"
    out = arguments.out or Path("results") / f"{name}.jsonl"
    report = accuracy.run(
        arguments.grid,
        out=out,
        save_dir=arguments.save_dir,
        data_dir=arguments.data_dir,
        device=choose_device(arguments.device),
        download=arguments.download,
        quick=arguments.quick,
        only=arguments.dataset,
        methods=arguments.method,
    )
    _tell(report, out, [*tables.write_accuracy(out), *plots.draw_accuracy(out)], arguments.json)


def _add_latency(benches: Commands) -> None:
    sub = add_command(
        benches,
        "latency",
        _latency,
        "load the real service under every method of a grid; rows, tables and figures",
        "codedinvnet bench latency --data-dir data --only batch=10 --only load=0.4",
    )
    add, grid = sub.add_argument, Path("configs/bench/latency.json")
    add("grid", nargs="?", type=Path, default=grid, help=f"methods, loads, stragglers ({grid})")
    add("--out", type=Path, help="rows; finished ones in it are kept (results/latency.jsonl)")
    add(
        "--only",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="only runs of this method, batch, load, stragglers or run; repeatable (all)",
    )
    add("--quick", action="store_true", help="minutes: one setting, 3,000 queries a method")
    add("--save-dir", type=Path, default=Path("runs"), help="where trained parts lie (runs)")
    add("--data-dir", type=Path, help="folder of image sets (the cache)")
    add("--download", action="store_true", help="download into --data-dir")
    log = Path("bench-latency.log")
    add("--log", type=Path, default=log, help=f"servers' log ({log})")
    add("--json", action="store_true", help="print one JSON object")


def _latency(arguments: argparse.Namespace) -> None:
    from codedinvnet.bench import latency, plots, tables

    name = "latency-quick" if arguments.quick else "latency"
    out = arguments.out or Path("results") / f"{name}.jsonl"
    report = latency.run(
        arguments.grid,
        out=out,
        save_dir=arguments.save_dir,
        data_dir=arguments.data_dir,
        log=arguments.log,
        download=arguments.download,
        quick=arguments.quick,
        only=arguments.only,
    )
    _tell(report, out, [*tables.write_latency(out), *plots.draw_latency(out)], arguments.json)


def _tell(report: dict[str, Any], out: Path, written: Sequence[Path], as_json: bool) -> None:
    """Print what was done and written.

    Raises:
        UserError: then, if something failed.
    """
    from codedinvnet import study

    print_report({**report, "rows": str(out), "written": [str(p) for p in written]}, as_json)
    study.refuse_failures(report["failed"], "of the trials", out)
