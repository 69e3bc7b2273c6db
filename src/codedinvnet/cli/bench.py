"""The command `bench`, with a command of its own for each benchmark."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from codedinvnet.cli.common import Commands, add_command, flushing_denormals, print_report

MOST_LINES = 40
"""Results that a terminal shows; the tables have all."""
EXAMPLES = """examples:
  codedinvnet bench accuracy --data-dir data --method mine.py:Mine
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
    sub = add_command(
        benches,
        "accuracy",
        _accuracy,
        "erase workers under every method of a grid; rows, tables and figures",
        "codedinvnet bench accuracy --data-dir data --only dataset=mnist --only k=10",
    )
    add = sub.add_argument
    grid = "methods, data sets, k, missing workers (JSON; default: the grid of the shipped rows)"
    add("grid", nargs="?", type=Path, help=grid)
    add(
        "--method",
        action="append",
        default=[],
        help="only this method of the grid; FILE.py:CLASS measures your own, and the table has the "
        "shipped rows of the others, too; repeatable (all)",
    )
    split = "images to score on (test); use validation while you choose"
    add("--split", choices=("test", "validation"), default="test", help=split)
    add("--device", default="auto", help="cpu, cuda, cuda:1 (auto)")
    add("--save-dir", type=Path, default=Path("runs"), help="where trained parts lie (runs)")
    keys = "method, dataset, base, k, missing, corrupt or seed"
    _add_shared(sub, "accuracy", keys, "minutes: short trainings, 1,000 images")

    sub = add_command(
        benches,
        "latency",
        _latency,
        "load the real service under every method of a grid; rows and tables",
        "codedinvnet bench latency --data-dir data --only batch=10 --only load=0.4",
    )
    file, log = Path("configs/bench/latency.json"), Path("bench-latency.log")
    add = sub.add_argument
    add("grid", nargs="?", type=Path, default=file, help=f"methods, loads, stragglers ({file})")
    add("--log", type=Path, default=log, help=f"servers' log ({log})")
    keys = "method, batch, load, stragglers or run"
    _add_shared(sub, "latency", keys, "minutes: one setting, 3,000 queries a method")


def _add_shared(sub: argparse.ArgumentParser, name: str, keys: str, quick: str) -> None:
    """Add the options of both benchmarks."""
    add, only = sub.add_argument, f"only what has this {keys}; repeatable (all)"
    add("--only", action="append", default=[], metavar="KEY=VALUE", help=only)
    add("--out", type=Path, help=f"rows; finished ones in it are kept (results/{name}.jsonl)")
    add("--quick", action="store_true", help=quick)
    add("--data-dir", type=Path, help="folder of image sets (the cache)")
    add("--download", action="store_true", help="download into --data-dir")
    add("--json", action="store_true", help="print one JSON object")


def _shared(arguments: argparse.Namespace, name: str) -> dict[str, Any]:
    """Return the options of both benchmarks, by the names of their functions' parameters."""
    found = {key: getattr(arguments, key) for key in ("data_dir", "download", "quick", "only")}
    file = f"{name}-quick.jsonl" if arguments.quick else f"{name}.jsonl"
    return {**found, "out": arguments.out or Path("results") / file}


@flushing_denormals
def _accuracy(arguments: argparse.Namespace) -> None:
    from codedinvnet.evaluation import methods, plots, tables
    from codedinvnet.evaluation.stages import choose_device
    from codedinvnet.evaluation.trials import GRID, is_foreign

    validation = arguments.split == "validation"
    shared = _shared(arguments, "accuracy-validation" if validation else "accuracy")
    report = methods.run(
        arguments.grid or GRID,
        device=choose_device(arguments.device),
        methods=arguments.method,
        split=arguments.split,
        save_dir=arguments.save_dir,
        **shared,
    )
    own = any(map(is_foreign, arguments.method))
    compare = own and not (arguments.quick or validation)
    out = shared["out"]
    written = [*tables.write_accuracy(out, compare), *plots.draw_accuracy(out, compare)]
    lines = tables.brief(tables.shown_frame(out, compare))
    if len(lines) <= MOST_LINES and not arguments.json:
        print("\n".join(lines))
    _report(report, "trials", out, written, arguments.json)


@flushing_denormals
def _latency(arguments: argparse.Namespace) -> None:
    from codedinvnet.evaluation import latency, latency_tables

    shared = _shared(arguments, "latency")
    report = latency.run(arguments.grid, log=arguments.log, **shared)
    written = latency_tables.write_latency(shared["out"])
    _report(report, "runs", shared["out"], written, arguments.json)


def _report(
    report: dict[str, Any], what: str, out: Path, written: Sequence[Path], as_json: bool
) -> None:
    """Print how many trials or runs were done, and what was written; then raise if some failed."""
    from codedinvnet.common.grid import refuse_failures

    print_report({**report, "rows": str(out), "written": [str(p) for p in written]}, as_json)
    refuse_failures(report["failed"], f"of the {what}", out)
