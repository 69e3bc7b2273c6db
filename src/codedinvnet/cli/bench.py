"""The command `bench accuracy`."""

from __future__ import annotations

import argparse
from pathlib import Path

from codedinvnet.cli.common import Commands, add_command, flushing_denormals, print_report

MOST_LINES = 40
"""Results that a terminal shows; the tables have all."""


def add_commands(commands: Commands) -> None:
    """Add `bench` with its benchmark."""
    summary = "compare the accuracy of all methods"
    bench = commands.add_parser("bench", help=summary, description=f"{summary.capitalize()}.")
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
    add(
        "--only",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="only what has this method, dataset, base, k, missing, corrupt or seed; repeatable "
        "(all)",
    )
    add("--out", type=Path, help="rows; finished ones are kept (results/accuracy.jsonl)")
    add("--quick", action="store_true", help="minutes: short trainings, 1,000 images")
    add("--data-dir", type=Path, help="folder of image sets (the cache)")
    add("--download", action="store_true", help="download into --data-dir")
    add("--json", action="store_true", help="print one JSON object")


@flushing_denormals
def _accuracy(arguments: argparse.Namespace) -> None:
    from codedinvnet.common.grid import refuse_failures
    from codedinvnet.evaluation import methods, plots, tables
    from codedinvnet.evaluation.stages import choose_device
    from codedinvnet.evaluation.trials import GRID, is_foreign

    validation = arguments.split == "validation"
    name = "accuracy-validation" if validation else "accuracy"
    out = arguments.out or Path("results") / f"{name}{'-quick' if arguments.quick else ''}.jsonl"
    report = methods.run(
        arguments.grid or GRID,
        out=out,
        device=choose_device(arguments.device),
        methods=arguments.method,
        split=arguments.split,
        **{
            key: getattr(arguments, key)
            for key in ("save_dir", "data_dir", "download", "quick", "only")
        },
    )
    own = any(map(is_foreign, arguments.method))
    compare = own and not (arguments.quick or validation)
    written = [*tables.write_accuracy(out, compare), *plots.draw_accuracy(out, compare)]
    lines = tables.brief(tables.shown_frame(out, compare))
    if len(lines) <= MOST_LINES and not arguments.json:
        print("\n".join(lines))
    where = {"rows": str(out), "written": [str(path) for path in written]}
    print_report({**report, **where}, arguments.json)
    refuse_failures(report["failed"], "of the trials", out)
