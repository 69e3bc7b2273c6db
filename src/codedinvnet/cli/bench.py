"""The command `bench`, with a command of its own for each benchmark."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from codedinvnet.cli.common import Commands, add_command, print_report, seed
from codedinvnet.errors import UserError

EXAMPLES = """examples:
  codedinvnet bench serve mnist --quick --json
  codedinvnet bench ablation configs/bench/ablation.json --data-dir data
  codedinvnet bench inverse mnist --json
  codedinvnet bench embed mnist --json
  codedinvnet bench train mnist --json
  codedinvnet bench engine mnist --json
  codedinvnet bench accuracy configs/bench/accuracy.json --data-dir data
  codedinvnet bench latency --data-dir data --quick
"""

SPEED_BENCHES = {
    "inverse": "time the checked inverse beside fixed numbers of unchecked iterations",
    "embed": "time an embedding beside one that normalises the weights in every pass",
    "train": "time a training step beside one that normalises the weights in every pass",
    "engine": "time a worker's tasks by PyTorch and by ONNX Runtime",
}


def add_commands(commands: Commands) -> None:
    """Add `bench` and its benchmarks."""
    summary = "measure what the project promises"
    bench = commands.add_parser(
        "bench",
        help=summary,
        description=summary[0].upper() + summary[1:] + ".",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    benches = bench.add_subparsers(title="benchmarks", required=True, metavar="BENCHMARK")
    _add_serve(benches)
    _add_ablation(benches)
    _add_speed(benches)
    _add_accuracy(benches)
    _add_latency(benches)


def _add_serve(benches: Commands) -> None:
    sub = add_command(
        benches,
        "serve",
        _serve,
        "measure failures, latency and memory of the service, on real processes",
        "codedinvnet bench serve mnist --quick --json",
    )
    sub.add_argument("bundle", nargs="?", default="mnist", help="bundle to serve (mnist)")
    sub.add_argument("--quick", action="store_true", help="a minute's version")
    sub.add_argument(
        "--part",
        action="append",
        default=[],
        help="only this part: pool, overhead, chaos, light, stragglers, variants or soak; "
        "repeatable (all)",
    )
    sub.add_argument("--data-dir", type=Path, help="send its test images, not the shipped ones")
    sub.add_argument("--seed", type=seed, default=0, help="of arrivals and groups (0)")
    log = Path("bench-serve.log")
    sub.add_argument("--log", type=Path, default=log, help=f"servers' log ({log})")
    sub.add_argument("--out", type=Path, help="write the JSON to this file, too")
    sub.add_argument("--json", action="store_true", help="print one JSON object")


def _serve(arguments: argparse.Namespace) -> None:
    from codedinvnet.bench import serve

    unknown = set(arguments.part) - set(serve.PARTS)
    if unknown:
        raise UserError(f"--part: {', '.join(sorted(unknown))} not one of {', '.join(serve.PARTS)}")
    report = serve.run(
        arguments.bundle,
        quick=arguments.quick,
        data_dir=arguments.data_dir,
        seed=arguments.seed,
        log=arguments.log,
        parts=arguments.part,
        out=arguments.out,
    )
    print_report(report, as_json=arguments.json)


def _add_ablation(benches: Commands) -> None:
    sub = add_command(
        benches,
        "ablation",
        _ablation,
        "measure what each part of the design is worth, one change at a time",
        "codedinvnet bench ablation configs/bench/ablation.json --data-dir data",
    )
    sub.add_argument("grid", type=Path, help="grid file (JSON): base settings, rows, seeds")
    sub.add_argument(
        "--out",
        type=Path,
        help="a line a trial; finished ones in it are kept (runs/ablation.jsonl)",
    )
    sub.add_argument("--save-dir", type=Path, help="for runs (runs/ablation)")
    sub.add_argument(
        "--quick", action="store_true", help="minutes: one image set, one seed, short trainings"
    )
    sub.add_argument("--data-dir", type=Path, help="folder of image sets (the cache)")
    sub.add_argument("--device", default="auto", help="cpu, cuda, cuda:1 (auto)")
    sub.add_argument("--no-test", action="store_true", help="leave the test split unread")


def _refuse_failures(failed: int, what: str, rows: Path) -> None:
    """Raise UserError if trials failed, so that scripts notice."""
    if failed:
        raise UserError(
            f"{failed} {what} failed; the errors are in {rows}, and the same command tries again"
        )


def _ablation(arguments: argparse.Namespace) -> None:
    from codedinvnet.bench import ablation
    from codedinvnet.stages import choose_device

    name = "ablation-quick" if arguments.quick else "ablation"
    out = arguments.out or Path("runs") / f"{name}.jsonl"
    results = ablation.run(
        arguments.grid,
        out,
        save_dir=arguments.save_dir or Path("runs") / name,
        data_dir=arguments.data_dir,
        device=choose_device(arguments.device),
        test=not arguments.no_test,
        quick=arguments.quick,
    )
    print(ablation.table(results))
    _refuse_failures(sum("error" in row for row in results), "of the trials", out)


def _add_speed(benches: Commands) -> None:
    for part, summary in SPEED_BENCHES.items():
        sub = add_command(benches, part, _speed, summary, f"codedinvnet bench {part} mnist --json")
        sub.set_defaults(part=part)
        sub.add_argument("bundle", nargs="?", default="mnist", help="bundle to measure (mnist)")
        sub.add_argument("--quick", action="store_true", help="a short version, rough figures")
        if part != "engine":
            help_ = "take its test images, not the shipped ones"
            sub.add_argument("--data-dir", type=Path, help=help_)
        sub.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1 (cpu)")
        sub.add_argument("--out", type=Path, help="write the JSON to this file, too")
        sub.add_argument("--json", action="store_true", help="print one JSON object")


def _speed(arguments: argparse.Namespace) -> None:
    from codedinvnet.bench import speed
    from codedinvnet.stages import choose_device

    report = speed.run(
        arguments.part,
        arguments.bundle,
        quick=arguments.quick,
        data_dir=getattr(arguments, "data_dir", None),
        device=choose_device(arguments.device),
        out=arguments.out,
    )
    print(json.dumps(report) if arguments.json else speed.table(report))


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
    from codedinvnet.bench.grid import load_grid
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
    written = [*tables.write(out, load_grid(arguments.grid)), *plots.write(out)]
    print_report({**report, "rows": str(out), "written": [str(p) for p in written]}, arguments.json)
    _refuse_failures(report["failed"], "of the trials", out)


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
    from codedinvnet.bench import latency, latency_plots, latency_tables

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
    written = [*latency_tables.write(out), *latency_plots.write(out)]
    print_report({**report, "rows": str(out), "written": [str(p) for p in written]}, arguments.json)
    _refuse_failures(report["failed"], "of the runs", out)
