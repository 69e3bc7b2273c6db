"""The command line of this repository's own benchmarks: parse, and call one function."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from codedinvnet.cli.common import (
    Commands,
    add_command,
    guarded,
    print_report,
    seed,
)
from codedinvnet.errors import UserError

EXAMPLES = """examples:
  python -m benchmarks gateway --quick
  python -m benchmarks advised --quick --out advised.json
  python -m benchmarks gateway-faults --quick
  python -m benchmarks ablation configs/bench/ablation.json --data-dir data
  python -m benchmarks inverse mnist --json
  python -m benchmarks embed mnist --json
  python -m benchmarks train mnist --json
  python -m benchmarks engine mnist --json
  python -m benchmarks liars --data-dir data --json
  python -m benchmarks drift --data-dir data --json
  python -m benchmarks protected lite0 --source imagenette --out runs/lite0
  python -m benchmarks recommended --data-dir data
  python -m benchmarks straggling protection/ model.onnx --inputs x.npy --out out.jsonl

run it in the repository's root; the comparisons of all methods are `codedinvnet bench`, and
`python -m benchmarks.figures` renders what was measured
"""

SPEEDS = {
    "inverse": "time the checked inverse beside fixed numbers of unchecked iterations",
    "embed": "time an embedding beside one that normalises the weights in every pass",
    "train": "time a training step beside one that normalises the weights in every pass",
    "engine": "time a worker's tasks by PyTorch and by ONNX Runtime",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run `python -m benchmarks`; return the exit code."""
    arguments = build_parser().parse_args(argv)
    command: Callable[[argparse.Namespace], None] = arguments.run
    resumes = hasattr(arguments, "save_dir")
    kept = "finished epochs and rows are kept: the same command goes on" if resumes else ""
    return guarded(lambda: command(arguments), kept)


def build_parser() -> argparse.ArgumentParser:
    """Build the parser of `python -m benchmarks` with all its benchmarks."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description="Measure what this repository states of its own design.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    benches = parser.add_subparsers(title="benchmarks", required=True, metavar="BENCHMARK")
    _add_gateway(benches)
    _add_advised(benches)
    _add_gateway_faults(benches)
    _add_ablation(benches)
    _add_speed(benches)
    _add_liars(benches)
    _add_drift(benches)
    _add_protected(benches)
    _add_recommended(benches)
    _add_straggling(benches)
    return parser


def _add_drift(benches: Commands) -> None:
    sub = add_command(
        benches,
        "drift",
        _drift,
        "count what a service releases while its inputs are not those of its calibration",
        "python -m benchmarks drift --data-dir data --json",
    )
    bundles = ["mnist", "fashion"]
    help_ = "calibrated bundles (mnist fashion)"
    sub.add_argument("bundles", nargs="*", default=bundles, metavar="bundle", help=help_)
    sub.add_argument("--data-dir", type=Path, help="folder of image sets (the cache)")
    sub.add_argument("--runs", type=int, default=20, help="runs of each drift (20)")
    sub.add_argument("--seed", type=seed, default=0, help="of groups and noise (0)")
    sub.add_argument("--json", action="store_true", help="print one JSON object")


def _drift(arguments: argparse.Namespace) -> None:
    from benchmarks import drift

    if arguments.runs < 1:
        raise UserError("--runs: must be at least 1")
    unknown = [name for name in arguments.bundles if name not in drift.OTHER]
    if unknown:
        raise UserError(f"bundle: {unknown[0]!r} is not one of {', '.join(drift.OTHER)}")
    how = {"runs": arguments.runs, "seed": arguments.seed}
    _told(drift.run(arguments.bundles, arguments.data_dir, **how), arguments.json)


def _told(report: dict[str, Any], as_json: bool) -> None:
    if as_json:
        print_report(report, as_json=True)
        return
    for row in report["rows"]:
        print_report(row, as_json=False)
        print()


def _add_recommended(benches: Commands) -> None:
    sub = add_command(
        benches,
        "recommended",
        _recommended,
        "protect ten models, and measure what is recommended on other inputs",
        "python -m benchmarks recommended --data-dir data",
    )
    sub.add_argument("--data-dir", type=Path, default=Path("data"), help="of image sets (data)")
    sub.add_argument("--minutes", type=float, default=0.8, help="for each protection (0.8)")
    sub.add_argument("--work", type=Path, default=Path("runs/recommended"), help="for what is made")
    out = Path("docs/results/protect/recommended.json")
    sub.add_argument("--out", type=Path, default=out, help=f"the rows ({out})")


def _recommended(arguments: argparse.Namespace) -> None:
    from benchmarks import recommended

    rows = recommended.run(
        arguments.data_dir, arguments.work, arguments.out, minutes=arguments.minutes
    )
    print(recommended.table(rows))


def _add_straggling(benches: Commands) -> None:
    sub = add_command(
        benches,
        "straggling",
        _straggling,
        "serve a protected model under straggler models, and compare it with hedging",
        "python -m benchmarks straggling protection/ model.onnx --inputs x.npy --out out.jsonl",
    )
    add = sub.add_argument
    add("protection", type=Path, help="folder that `codedinvnet protect` wrote")
    add("model", type=Path, help="of which it is the protection")
    add("--inputs", type=Path, required=True, help="as `codedinvnet protect` takes them")
    add("--method", help="one of the protection's (the recommended one)")
    add("--scale", type=float, help="factor of pixels 0..255, as for `protect`")
    add("--mean", type=float, nargs="+", default=(), help="subtracted then")
    add("--std", type=float, nargs="+", default=(), help="divides then")
    add("--workers", type=int, default=11, help="worker processes (11)")
    add("--load", type=float, default=0.4, help="share of their time for direct answers (0.4)")
    add("--batch", type=int, default=1, help="queries of a request (1)")
    add("--requests", type=int, default=10_000, help="of a run (10000)")
    add("--stragglers", nargs="+", default=["pareto", "held", "slower"], help="straggler models")
    add("--seed", type=seed, default=0, help="of arrivals and inputs (0)")
    add("--out", type=Path, required=True, help="the rows, JSON; finished runs in it are kept")
    add("--log", type=Path, default=Path("runs/straggling.log"), help="of the servers")


def _straggling(arguments: argparse.Namespace) -> None:
    from benchmarks import straggling
    from codedinvnet.protect.images import Preprocessing

    how = Preprocessing(scale=arguments.scale, mean=tuple(arguments.mean), std=tuple(arguments.std))
    names = ("workers", "load", "batch", "requests", "stragglers", "seed", "out", "log")
    rows = straggling.run(
        arguments.protection,
        arguments.model,
        arguments.inputs,
        method=arguments.method,
        how=how,
        **{name: getattr(arguments, name) for name in names},
    )
    print(straggling.table(rows))


def _add_protected(benches: Commands) -> None:
    sub = add_command(
        benches,
        "protected",
        _protected,
        "protect a model as users have it, and write the row into docs/results/protect",
        "python -m benchmarks protected lite0 --source imagenette --out runs/lite0",
    )
    rows = "digits-mlp, digits-boosted, resnet, resnet-k4, resnet-code, lite0, lite2 or magika"
    sub.add_argument("row", help=rows)
    sub.add_argument(
        "--source",
        type=Path,
        help="folder with CIFAR-10's train.npz, a clone of Imagenette, or files (this machine's)",
    )
    sub.add_argument("--out", type=Path, required=True, help="folder for model and protection")
    sub.add_argument("--minutes", type=float, default=30.0, help="of codedinvnet protect (30)")


def _protected(arguments: argparse.Namespace) -> None:
    from benchmarks import protected

    if arguments.row not in protected.RECIPES:
        raise UserError(f"{arguments.row!r} is not one of {', '.join(protected.RECIPES)}")
    row = protected.run(arguments.row, arguments.out, arguments.source, arguments.minutes)
    print(row)


def _add_liars(benches: Commands) -> None:
    sub = add_command(
        benches,
        "liars",
        _liars,
        "count the answers after which a worker that answers wrongly is named",
        "python -m benchmarks liars --data-dir data --json",
    )
    bundles = ["mnist", "fashion"]
    help_ = "bundles with guesses (mnist fashion)"
    sub.add_argument("bundles", nargs="*", default=bundles, metavar="bundle", help=help_)
    sub.add_argument("--data-dir", type=Path, help="folder of image sets (the cache)")
    sub.add_argument("--runs", type=int, default=20, help="runs of each fault (20)")
    sub.add_argument("--clean", type=int, default=1_000_000, help="sound answers (1000000)")
    sub.add_argument("--seed", type=seed, default=0, help="of groups, roles and faults (0)")
    sub.add_argument("--json", action="store_true", help="print one JSON object")


def _liars(arguments: argparse.Namespace) -> None:
    from benchmarks import liars

    if min(arguments.runs, arguments.clean) < 1:
        raise UserError("--runs and --clean: must be at least 1")
    report = liars.run(
        arguments.bundles,
        arguments.data_dir,
        runs=arguments.runs,
        clean=arguments.clean,
        seed=arguments.seed,
    )
    _told(report, arguments.json)


def _add_advised(benches: Commands) -> None:
    sub = add_command(
        benches,
        "advised",
        _advised,
        "compare what advise predicts before switches of policy with what is measured after them",
        "python -m benchmarks advised --quick --out advised.json",
    )
    sub.add_argument("--out", type=Path, required=True, help="the report (JSON)")
    sub.add_argument("--quick", action="store_true", help="two straggler models, few requests")
    sub.add_argument("--seed", type=seed, default=0, help="of arrivals, images and faults (0)")


def _advised(arguments: argparse.Namespace) -> None:
    from benchmarks.advised import lines, run
    from codedinvnet.files import check_writable

    check_writable(arguments.out)
    report = run(arguments.out, quick=arguments.quick, seed=arguments.seed)
    print("\n".join(lines(report)))


def _add_gateway(benches: Commands) -> None:
    sub = add_command(
        benches,
        "gateway",
        _gateway,
        "time requests to Triton through the gateway, compared with those without it",
        "python -m benchmarks gateway --quick",
    )
    sub.add_argument("--quick", action="store_true", help="a minute's version")
    sub.add_argument("--json", action="store_true", help="print one JSON object")


def _gateway(arguments: argparse.Namespace) -> None:
    from benchmarks import gateway

    print_report(gateway.run(quick=arguments.quick), as_json=arguments.json)


def _add_gateway_faults(benches: Commands) -> None:
    sub = add_command(
        benches,
        "gateway-faults",
        _gateway_faults,
        "harm one upstream of a gateway after another, and count what clients see",
        "python -m benchmarks gateway-faults --quick",
    )
    sub.add_argument("--policy", default="auto", help="the gateway's (auto)")
    sub.add_argument("--quick", action="store_true", help="a minute's version")
    sub.add_argument("--json", action="store_true", help="print one JSON object")


def _gateway_faults(arguments: argparse.Namespace) -> None:
    from benchmarks import gateway_faults

    report = gateway_faults.measure(quick=arguments.quick, policy=arguments.policy)
    print_report(report, as_json=arguments.json)


def _add_ablation(benches: Commands) -> None:
    sub = add_command(
        benches,
        "ablation",
        _ablation,
        "measure what each part of the design is worth, one change at a time",
        "python -m benchmarks ablation configs/bench/ablation.json --data-dir data",
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


def _ablation(arguments: argparse.Namespace) -> None:
    from benchmarks import ablation
    from codedinvnet import study
    from codedinvnet.stages import choose_device

    name = "ablation-quick" if arguments.quick else "ablation"
    out = arguments.out or Path("runs") / f"{name}.jsonl"
    rows = ablation.run(
        arguments.grid,
        out,
        save_dir=arguments.save_dir or Path("runs") / name,
        data_dir=arguments.data_dir,
        device=choose_device(arguments.device),
        test=not arguments.no_test,
        quick=arguments.quick,
    )
    print(ablation.table(rows, ablation.load_grid(arguments.grid)))
    study.refuse_failures(sum(row["error"] is not None for row in rows), "of the trials", out)


def _add_speed(benches: Commands) -> None:
    for part, summary in SPEEDS.items():
        sub = add_command(
            benches, part, _speed, summary, f"python -m benchmarks {part} mnist --json"
        )
        sub.set_defaults(part=part)
        sub.add_argument("bundle", nargs="*", default=["mnist"], help="what to measure (mnist)")
        sub.add_argument("--quick", action="store_true", help="a short version, rough figures")
        if part != "engine":
            help_ = "take its test images, not the shipped ones"
            sub.add_argument("--data-dir", type=Path, help=help_)
        sub.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1 (cpu)")
        sub.add_argument("--out", type=Path, help="append the rows to this file (JSONL)")
        sub.add_argument("--json", action="store_true", help="print one JSON object")


def _speed(arguments: argparse.Namespace) -> None:
    from benchmarks import speed
    from codedinvnet.stages import choose_device

    rows = [
        row
        for name in arguments.bundle
        for row in speed.run(
            arguments.part,
            name,
            quick=arguments.quick,
            data_dir=getattr(arguments, "data_dir", None),
            device=choose_device(arguments.device),
            out=arguments.out,
        )
    ]
    print(json.dumps(rows) if arguments.json else speed.table(rows))
