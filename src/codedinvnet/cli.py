"""The command lines: the project's own and the paper's. Each parses and calls one function."""

from __future__ import annotations

import argparse
import json
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from codedinvnet.errors import UserError

if TYPE_CHECKING:
    from codedinvnet.config import Settings
    from codedinvnet.stages import Run

    Commands: TypeAlias = argparse._SubParsersAction[argparse.ArgumentParser]

# Heavy imports wait until a command needs them, so that --help and wrong usage answer at once.

EXAMPLES = """examples:
  codedinvnet demo
  codedinvnet evaluate mnist --k 10 --data-dir data --json
  codedinvnet info mnist
  codedinvnet serve mnist --k 10
  codedinvnet reproduce configs/mnist-recovery.json --data-dir data

the paper's four commands are those of main.py: python main.py --help
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run `codedinvnet`; return the exit code."""
    parser = _parser()
    arguments = parser.parse_args(argv)
    command: Callable[[argparse.Namespace], None] = arguments.run
    return _guarded(lambda: command(arguments))


def _guarded(call: Callable[[], None]) -> int:
    """Turn a user's mistake into one line on standard error and exit code 2."""
    warnings.formatwarning = lambda message, *_args, **_kwargs: f"warning: {message}\n"
    try:
        call()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except OSError as error:  # a full disk, a folder that may not be written
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        kept = "finished epochs, shards and rows are kept (train, sample, fuse: --resume)"
        print(f"interrupted; {kept}", file=sys.stderr)
        return 130
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="codedinvnet",
        description="Prediction serving that survives slow and dead workers (Coded-InvNet).",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")

    def command(
        name: str, run: Callable[[argparse.Namespace], None], summary: str, example: str
    ) -> argparse.ArgumentParser:
        return _command(commands, name, run, summary, example)

    def with_config(sub: argparse.ArgumentParser, resume: bool = True) -> None:
        sub.add_argument("config", type=Path, help="settings file (JSON)")
        sub.add_argument(
            "--save-dir", type=Path, default=Path("runs"), help="where run folders lie (runs)"
        )
        if resume:
            sub.add_argument(
                "--resume", action="store_true", help="go on from the newest checkpoint"
            )
        with_data(sub)

    def with_data(sub: argparse.ArgumentParser) -> None:
        sub.add_argument("--data-dir", type=Path, help="where the image sets lie")
        sub.add_argument("--download", action="store_true", help="download into --data-dir")
        sub.add_argument("--device", default="auto", help="cpu, cuda, cuda:1 (auto)")

    config = "configs/mnist-recovery.json --data-dir data"
    with_config(
        command("train", _train, "train the invertible network", f"codedinvnet train {config}")
    )
    sub = command(
        "sample",
        _sample,
        "generate the fusion data set of the paper's objective",
        "codedinvnet sample configs/mnist.json --k 2 --data-dir data",
    )
    with_config(sub)
    sub.add_argument("--k", type=int, help="group size (the settings' fusion.members)")
    sub = command("fuse", _fuse, "train the fusion encoder", f"codedinvnet fuse {config}")
    with_config(sub)
    sub.add_argument("--k", type=int, help="group size (the settings' fusion.members)")

    sub = command(
        "evaluate",
        _evaluate,
        "erase every member of every group and score the decoded answers",
        "codedinvnet evaluate mnist --k 10 --data-dir data --json",
    )
    _with_bundle(sub)
    with_data(sub)
    sub.add_argument("--k", type=int, default=10, help="group size (10)")
    sub.add_argument(
        "--split",
        choices=("test", "validation", "train", "sample"),
        default="test",
        help="which images; sample: the 1,000 test images in the package (test)",
    )
    sub.add_argument("--seed", type=int, default=0, help="of the groupings (0)")
    sub.add_argument("--groupings", type=int, default=5, help="random groupings to average (5)")
    sub.add_argument(
        "--evidence",
        choices=("both", "latent", "side"),
        default="both",
        help="answer from the decoded latent, the side features, or both (both)",
    )
    sub.add_argument("--pixel-mean", action="store_true", help="the average image in place of E")
    sub.add_argument(
        "--shuffle-parity", action="store_true", help="decode with another group's parity output"
    )

    sub = command(
        "invert",
        _invert,
        "invert the network on real images and measure its Lipschitz bound",
        "codedinvnet invert mnist --data-dir data --json",
    )
    _with_bundle(sub)
    with_data(sub)
    sub.add_argument("--split", choices=("test", "sample"), default="test", help="images (test)")
    sub.add_argument("--tolerance", type=float, default=1e-6, help="of each block (1e-6)")
    sub.add_argument("--limit", type=int, help="only the first images")

    sub = command(
        "info",
        _info,
        "describe a bundle: parameters, multiply-adds, times, provenance",
        "codedinvnet info mnist --json",
    )
    _with_bundle(sub)
    sub.add_argument("--device", default="auto", help="cpu, cuda, cuda:1 (auto)")

    sub = command(
        "demo",
        _demo,
        "recover erased predictions on shipped images, draw a group, serve through failures",
        "codedinvnet demo --out demo-out",
    )
    sub.add_argument("--out", type=Path, default=Path("demo-out"), help="folder for pictures")
    sub.add_argument("--seed", type=int, default=0, help="of the groupings (0)")

    _serve_parser(
        command(
            "serve",
            _serve,
            "serve a bundle over HTTP (Open Inference Protocol V2), through slow and dead workers",
            "codedinvnet serve mnist --k 10 --policy coded --demo",
        )
    )

    _bench_parser(commands)
    _simulate_parser(
        command(
            "simulate",
            _simulate,
            "simulate the service with its own rules, at any number of workers",
            "codedinvnet simulate configs/bench/simulate-pareto.json --policy hedge --workers 1000",
        )
    )
    _plan_parser(
        command(
            "plan",
            _plan,
            "find the method, k and r that meet a target with the fewest workers, by simulation",
            "codedinvnet plan mnist --qps 500 --p999-ms 150 --min-accuracy 0.97",
        )
    )

    sub = command(
        "reproduce",
        _reproduce,
        "run all stages of a settings file, finished ones kept, and evaluate on the test split",
        f"codedinvnet reproduce {config}",
    )
    with_config(sub, resume=False)
    sub.add_argument("--fresh", action="store_true", help="start over instead of resuming")
    sub.add_argument("--json", action="store_true", help="print one JSON object")
    return parser


def _command(
    commands: Commands,
    name: str,
    run: Callable[[argparse.Namespace], None],
    summary: str,
    example: str,
) -> argparse.ArgumentParser:
    """Add a command with its help and return its parser."""
    sub = commands.add_parser(
        name,
        help=summary,
        description=summary[0].upper() + summary[1:] + ".",
        epilog=f"example:\n  {example}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    sub.set_defaults(run=run)
    return sub


BENCH_EXAMPLES = """examples:
  codedinvnet bench serve mnist --quick --json
  codedinvnet bench ablation configs/bench/ablation.json --data-dir data
  codedinvnet bench inverse mnist --json
  codedinvnet bench embed mnist --json
  codedinvnet bench train mnist --json
  codedinvnet bench accuracy configs/bench/accuracy.json --data-dir data
  codedinvnet bench latency --data-dir data --quick
"""


SPEED_BENCHES = {
    "inverse": "time the checked inverse beside fixed numbers of unchecked iterations",
    "embed": "time an embedding beside one that normalises the weights in every pass",
    "train": "time a training step beside one that normalises the weights in every pass",
}


def _bench_parser(commands: Commands) -> None:
    """Add `bench` with a command of its own for each benchmark."""
    summary = "measure what the project promises"
    bench = commands.add_parser(
        "bench",
        help=summary,
        description=summary[0].upper() + summary[1:] + ".",
        epilog=BENCH_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    benches = bench.add_subparsers(title="benchmarks", required=True, metavar="BENCHMARK")

    sub = _command(
        benches,
        "serve",
        _bench_serve,
        "measure failures, latency and memory of the service, on real processes",
        "codedinvnet bench serve mnist --quick --json",
    )
    sub.add_argument("bundle", nargs="?", default="mnist", help="bundle to serve (mnist)")
    sub.add_argument("--quick", action="store_true", help="a minute's version")
    sub.add_argument("--part", action="append", default=[], help="only this part; repeatable")
    sub.add_argument("--data-dir", type=Path, help="send its test images, not the shipped ones")
    sub.add_argument("--seed", type=int, default=0, help="of arrivals and groups (0)")
    sub.add_argument("--log", type=Path, default=Path("bench-serve.log"), help="servers' log")
    sub.add_argument("--out", type=Path, help="write the JSON to this file, too")
    sub.add_argument("--json", action="store_true", help="print one JSON object")

    sub = _command(
        benches,
        "ablation",
        _bench_ablation,
        "measure what each part of the design is worth, one change at a time",
        "codedinvnet bench ablation configs/bench/ablation.json --data-dir data",
    )
    sub.add_argument("grid", type=Path, help="grid file (JSON): base settings, rows, seeds")
    sub.add_argument(
        "--out",
        type=Path,
        default=Path("runs/ablation.jsonl"),
        help="a line a trial; finished ones in it are kept (runs/ablation.jsonl)",
    )
    sub.add_argument(
        "--save-dir", type=Path, default=Path("runs/ablation"), help="for runs (runs/ablation)"
    )
    sub.add_argument("--data-dir", type=Path, help="where the image sets lie")
    sub.add_argument("--device", default="auto", help="cpu, cuda, cuda:1 (auto)")
    sub.add_argument("--no-test", action="store_true", help="leave the test split unread")

    for part, summary in SPEED_BENCHES.items():
        sub = _command(
            benches, part, _bench_speed, summary, f"codedinvnet bench {part} mnist --json"
        )
        sub.set_defaults(part=part)
        sub.add_argument("bundle", nargs="?", default="mnist", help="bundle to measure (mnist)")
        sub.add_argument("--quick", action="store_true", help="a short version, rough figures")
        sub.add_argument("--data-dir", type=Path, help="take its test images, not the shipped ones")
        sub.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1 (cpu)")
        sub.add_argument("--out", type=Path, help="write the JSON to this file, too")
        sub.add_argument("--json", action="store_true", help="print one JSON object")

    sub = _command(
        benches,
        "accuracy",
        _bench_accuracy,
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
    sub.add_argument("--dataset", action="append", default=[], help="only this one; repeatable")
    sub.add_argument("--quick", action="store_true", help="minutes: short trainings, 1,000 images")
    sub.add_argument("--data-dir", type=Path, help="where the image sets lie")
    sub.add_argument("--download", action="store_true", help="download into --data-dir")
    sub.add_argument("--device", default="auto", help="cpu, cuda, cuda:1 (auto)")
    sub.add_argument("--json", action="store_true", help="print one JSON object")
    _bench_latency_parser(benches)


def _bench_latency_parser(benches: Commands) -> None:
    """Add `bench latency`."""
    sub = _command(
        benches,
        "latency",
        _bench_latency,
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
        help="only runs of this method, batch, load, stragglers or run; repeatable",
    )
    add("--quick", action="store_true", help="six minutes: one setting, 3,000 queries a method")
    add("--save-dir", type=Path, default=Path("runs"), help="where trained parts lie (runs)")
    add("--data-dir", type=Path, help="where the image sets lie")
    add("--download", action="store_true", help="download into --data-dir")
    add("--log", type=Path, default=Path("bench-latency.log"), help="servers' log")
    add("--json", action="store_true", help="print one JSON object")


def _serve_parser(sub: argparse.ArgumentParser) -> None:
    """Add the options of `serve`; their names are the fields of `ServeOptions`."""
    sub.add_argument("bundle", help="name of a shipped bundle, or a folder")
    add = sub.add_argument
    add("--k", type=int, default=10, help="queries in a coding group (10)")
    add("--workers", type=int, help="worker processes (as many as a group has tasks: k + 1)")
    add(
        "--method",
        default="coded-invnet",
        help="coded-invnet, approxifer, approxifer-byzantine, nercc or oracle; with --part also "
        "parm, parm-concat, parm-learned or small-backup (coded-invnet)",
    )
    add("--part", type=Path, help="the checkpoint that `bench accuracy` left for that method and k")
    add(
        "--policy",
        default="coded",
        help="uncoded, replicate, hedge, coded or coded+hedge (coded)",
    )
    add("--routing", default="least-loaded", help="least-loaded or round-robin (least-loaded)")
    add("--pool", default="local", help="local processes, or ray (local)")
    add("--ray-address", help="a running Ray cluster; without it, one is started here")
    add("--device", default="cpu", help="of the workers: cpu, cuda (cpu)")
    add("--threads-per-worker", type=int, default=1, help="PyTorch threads of a worker (1)")
    add("--host", default="127.0.0.1", help="address to listen on (127.0.0.1)")
    add("--port", type=int, default=8000, help="port; 0: a free one (8000)")
    add("--deadline-ms", type=float, default=5000, help="until a query fails (5000)")
    add(
        "--group-timeout-ms",
        type=float,
        default=20,
        help="until a group is coded that is not full (20)",
    )
    add("--hang-timeout-ms", type=float, default=3000, help="until a silent worker goes (3000)")
    add(
        "--min-confidence",
        type=float,
        default=0.0,
        help="coded+hedge: check decoded answers below it by a copy (0)",
    )
    add("--max-pending", type=int, default=2000, help="unanswered queries before 503 (2000)")
    add("--max-batch", type=int, default=256, help="images of one request (256)")
    add("--token-file", type=Path, help="clients must send the token in this file")
    add("--faults", type=Path, help="inject the faults of this file (JSON), for experiments")
    add("--demo", action="store_true", help="let the page send images and hurt workers")


def _simulate_parser(sub: argparse.ArgumentParser) -> None:
    """Add the options of `simulate`; their names are the fields of `SimulateOptions`."""
    sub.add_argument("scenario", type=Path, help="scenario or sweep (JSON; see configs/bench)")
    add = sub.add_argument
    add("--policy", help="uncoded, replicate, hedge, coded or coded+hedge (the scenario's)")
    add("--workers", type=int, help="how many (the scenario's)")
    add("--k", type=int, help="queries in a coding group (the scenario's)")
    add("--r", type=int, help="parity queries in a coding group (the scenario's)")
    add("--qps", type=float, help="images a second (the scenario's)")
    add("--batch", type=int, help="images of a request (the scenario's)")
    add("--queries", type=int, help="images in all (the scenario's)")
    add("--seed", type=int, help="of all draws (the scenario's)")
    add(
        "--stragglers",
        help="none, held, exponential, pareto, slower, bursts, hung, or a faults file",
    )
    add("--measured", type=Path, help="repeat these measured runs (JSONL) and compare")
    add("--out", type=Path, help="of a sweep: its rows (JSONL); those that are there are kept")
    add("--picture", type=Path, help="of a sweep: draw the map of p99.9 by load")
    add("--json", action="store_true", help="print one JSON object")


def _plan_parser(sub: argparse.ArgumentParser) -> None:
    """Add the options of `plan`; their names are the fields of `PlanOptions`."""
    sub.add_argument("bundle", help="name of a shipped bundle, or a folder: its accuracy counts")
    add = sub.add_argument
    add("--qps", type=float, required=True, help="images a second")
    add("--p999-ms", type=float, required=True, help="what p99.9 of the latencies may be")
    add("--min-accuracy", type=float, default=0.0, help="least overall accuracy, in 0..1 (0)")
    add("--scenario", type=Path, help="arrivals, times and stragglers (JSON; see configs/bench)")
    add("--service-ms", type=float, help="to embed an image (measured on this machine)")
    add("--encode-ms", type=float, help="to encode, each image of a group (measured here)")
    add(
        "--stragglers",
        help="none, held, exponential, pareto, slower, bursts, hung, or a faults file "
        "(the scenario's, else pareto)",
    )
    add("--batch", type=int, help="images of a request (1)")
    add("--policy", action="append", default=[], help="only this policy; repeatable")
    add("--k", action="append", type=int, default=[], help="only this k; repeatable")
    add("--queries", type=int, help="images in the longest run of each candidate (40000)")
    add("--seed", type=int, help="of all draws (0)")
    add("--json", action="store_true", help="print one JSON object")


def _with_bundle(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("bundle", help="name of a shipped bundle (mnist, fashion), or a folder")
    sub.add_argument("--json", action="store_true", help="print one JSON object")


def _run_of(arguments: argparse.Namespace, resume: int) -> Run:
    from codedinvnet.config import load_settings
    from codedinvnet.stages import Run, choose_device

    return Run(
        settings=load_settings(arguments.config),
        save_dir=arguments.save_dir,
        data_dir=arguments.data_dir,
        device=choose_device(arguments.device),
        download=arguments.download,
        resume=resume,
    )


def _resumable_run(arguments: argparse.Namespace) -> Run:
    return _run_of(arguments, -1 if arguments.resume else 0)


def _members(settings: Settings, asked: int | None) -> int:
    if asked is not None and asked < 2:
        raise UserError(f"k must be at least 2, got {asked}: a group of one is a plain copy")
    return asked or settings.fusion.members


def _train(arguments: argparse.Namespace) -> None:
    from codedinvnet import stages

    run = _resumable_run(arguments)
    _print({"network": str(run.network_folder), **stages.train(run)["validation"]}, as_json=False)


def _sample(arguments: argparse.Namespace) -> None:
    from codedinvnet import stages

    run = _resumable_run(arguments)
    _print(stages.sample(run, _members(run.settings, arguments.k)), as_json=False)


def _fuse(arguments: argparse.Namespace) -> None:
    from codedinvnet import stages

    run = _resumable_run(arguments)
    _print(stages.fuse(run, _members(run.settings, arguments.k)), as_json=False)


def _reproduce(arguments: argparse.Namespace) -> None:
    from codedinvnet import stages

    run = _run_of(arguments, 0 if arguments.fresh else -1)
    _print(stages.reproduce(run), as_json=arguments.json)


def _evaluate(arguments: argparse.Namespace) -> None:
    from codedinvnet.bundle import load_bundle
    from codedinvnet.report import evaluation_report
    from codedinvnet.stages import choose_device, evaluation_images

    bundle = load_bundle(arguments.bundle, choose_device(arguments.device))
    source = evaluation_images(bundle, arguments.split, arguments.data_dir, arguments.download)
    report = evaluation_report(
        bundle,
        source,
        split=arguments.split,
        k=arguments.k,
        groupings=arguments.groupings,
        seed=arguments.seed,
        evidence=arguments.evidence,
        pixel_mean=arguments.pixel_mean,
        shuffle_parity=arguments.shuffle_parity,
    )
    _print(report, as_json=arguments.json)


def _invert(arguments: argparse.Namespace) -> None:
    from codedinvnet.bundle import load_bundle
    from codedinvnet.report import inversion_report
    from codedinvnet.stages import choose_device, evaluation_images

    bundle = load_bundle(arguments.bundle, choose_device(arguments.device))
    source = evaluation_images(bundle, arguments.split, arguments.data_dir, arguments.download)
    report = inversion_report(
        bundle.model, source, tolerance=arguments.tolerance, limit=arguments.limit
    )
    _print({"bundle": bundle.info.name, "split": arguments.split, **report}, arguments.json)


def _info(arguments: argparse.Namespace) -> None:
    from codedinvnet.bundle import load_bundle
    from codedinvnet.report import info_report
    from codedinvnet.stages import choose_device

    bundle = load_bundle(arguments.bundle, choose_device(arguments.device))
    _print(info_report(bundle), as_json=arguments.json)


def _demo(arguments: argparse.Namespace) -> None:
    from codedinvnet.bundle import shipped_bundles
    from codedinvnet.data import SAMPLES
    from codedinvnet.demo import run_demo
    from codedinvnet.serving.demo import run_serving_demo

    names = [name for name in SAMPLES if name in shipped_bundles()]
    run_demo(names, arguments.out, arguments.seed)
    run_serving_demo(names[0], arguments.out, arguments.seed)


def _serve(arguments: argparse.Namespace) -> None:
    from codedinvnet.serving.serve import ServeOptions, serve

    options = {key: value for key, value in vars(arguments).items() if key != "run"}
    serve(ServeOptions(**options))


def _bench_serve(arguments: argparse.Namespace) -> None:
    from codedinvnet.bench import serve

    unknown = set(arguments.part) - set(serve.PARTS)
    if unknown:
        raise UserError(f"--part: {', '.join(unknown)} not one of {', '.join(serve.PARTS)}")
    report = serve.run(
        arguments.bundle,
        quick=arguments.quick,
        data_dir=arguments.data_dir,
        seed=arguments.seed,
        log=arguments.log,
        parts=arguments.part,
    )
    if arguments.out is not None:
        serve.save(report, arguments.out)
    _print(report, as_json=arguments.json)


def _bench_ablation(arguments: argparse.Namespace) -> None:
    from codedinvnet.bench import ablation
    from codedinvnet.stages import choose_device

    results = ablation.run(
        arguments.grid,
        arguments.out,
        save_dir=arguments.save_dir,
        data_dir=arguments.data_dir,
        device=choose_device(arguments.device),
        test=not arguments.no_test,
    )
    print(ablation.table(results))


def _bench_speed(arguments: argparse.Namespace) -> None:
    from codedinvnet.bench import speed
    from codedinvnet.bench.serve import save
    from codedinvnet.stages import choose_device

    report = speed.run(
        arguments.part,
        arguments.bundle,
        quick=arguments.quick,
        data_dir=arguments.data_dir,
        device=choose_device(arguments.device),
    )
    if arguments.out is not None:
        save(report, arguments.out)
    print(json.dumps(report) if arguments.json else speed.table(report))


def _simulate(arguments: argparse.Namespace) -> None:
    from codedinvnet.simulation.run import SimulateOptions, run_simulate

    options = {key: value for key, value in vars(arguments).items() if key not in ("run", "json")}
    report, lines = run_simulate(SimulateOptions(**options))
    print(json.dumps(report) if arguments.json else "\n".join(lines))


def _plan(arguments: argparse.Namespace) -> None:
    from codedinvnet.simulation.run import PlanOptions, run_plan

    options = {key: value for key, value in vars(arguments).items() if key not in ("run", "json")}
    options |= {"policy": tuple(arguments.policy), "k": tuple(arguments.k)}
    report, lines = run_plan(PlanOptions(**options))
    print(json.dumps(report) if arguments.json else "\n".join(lines))


def _bench_accuracy(arguments: argparse.Namespace) -> None:
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
    )
    written = [*tables.write(out), *plots.write(out)]
    _print({**report, "rows": str(out), "written": [str(p) for p in written]}, arguments.json)


def _bench_latency(arguments: argparse.Namespace) -> None:
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
    _print({**report, "rows": str(out), "written": [str(p) for p in written]}, arguments.json)


def _print(report: dict[str, Any], as_json: bool) -> None:
    """Print a report: one JSON object, or a line a key."""
    if as_json:
        print(json.dumps(report))
        return
    width = max(len(key) for key in report)
    for key, value in report.items():
        text = json.dumps(value) if isinstance(value, (dict, list)) else value
        print(f"{key:<{width}}  {text}")


PAPER_EXAMPLES = """the four commands of the paper:
  python ./main.py --config_file configs/mnist.json
  python ./main.py --config_file configs/mnist.json -fusion --nactors 2 -sample_fusion
  python ./main.py --config_file configs/mnist.json -fusion --nactors 2
  python ./main.py --config_file configs/mnist.json -fusion --nactors 2 -test_fusion
"""


def paper_main(argv: Sequence[str] | None = None) -> int:
    """Run the paper's command line (`main.py`); return the exit code."""
    parser = argparse.ArgumentParser(
        prog="main.py",
        description="Coded-InvNet, stage by stage, with the command line of the paper.",
        epilog=PAPER_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--config_file", type=Path, required=True, help="settings file (JSON)")
    add("--data_dir", type=Path, help="image sets (data, if it is there; else the usual places)")
    add("--save_dir", type=Path, default=Path("runs"), help="where run folders lie (runs)")
    add("--batch_size", type=int, help="of the stage that runs (its settings')")
    add("--lr", type=float, help="learning rate of the stage that runs (its settings')")
    add("--resume", type=int, default=0, help="epoch to go on from; 0: from the start")
    add("--nactors", type=int, help="k, the queries in a group (the settings' fusion.members)")
    add("--nsteps_save", type=int, default=16, help="batches of 128 targets in one saved shard")
    add("-fusion", action="store_true", help="the fusion stages instead of the network's")
    add("-sample_fusion", action="store_true", help="with -fusion: generate the data set")
    add("-test_fusion", action="store_true", help="with -fusion: evaluate on the test split")
    add("-test_inversion", action="store_true", help="invert the trained network on the test split")
    add(
        "-densityEstimation",
        "--densityEstimation",
        action="store_true",
        help="train the network by maximum likelihood",
    )
    add("--device", default="auto", help="cpu, cuda, cuda:1 (auto)")
    arguments = parser.parse_args(argv)
    return _guarded(lambda: _paper(arguments))


def _paper(arguments: argparse.Namespace) -> None:
    from codedinvnet import stages

    if (arguments.sample_fusion or arguments.test_fusion) and not arguments.fusion:
        raise UserError("-sample_fusion and -test_fusion go with -fusion")
    if arguments.resume < 0 or arguments.nsteps_save < 1:
        raise UserError("--resume must be 0 or an epoch, --nsteps_save at least 1")
    run = stages.Run(
        settings=_paper_settings(arguments),
        save_dir=arguments.save_dir,
        data_dir=arguments.data_dir or (Path("data") if Path("data").is_dir() else None),
        device=stages.choose_device(arguments.device),
        resume=arguments.resume,
    )
    members = _members(run.settings, arguments.nactors)
    if arguments.fusion:
        if arguments.sample_fusion:
            report = stages.sample(run, members, arguments.nsteps_save)
        elif arguments.test_fusion:
            report = stages.test_fusion(run, members)
        else:
            report = stages.fuse(run, members)
    elif arguments.test_inversion:
        report = stages.test_inversion(run)
    else:
        header = stages.train(run)
        report = {"network": str(run.network_folder), **header["validation"]}
    _print(report, as_json=False)


def _paper_settings(arguments: argparse.Namespace) -> Settings:
    """Apply the flags to the stage that runs."""
    from codedinvnet.config import load_settings, parse_settings

    raw = load_settings(arguments.config_file).model_dump(mode="json")
    if arguments.densityEstimation:
        raw["name"] += "-density"
        raw["training"]["objective"] = "density"
    section = raw["fusion" if arguments.fusion else "training"]
    if arguments.batch_size is not None:
        section["batch_size"] = arguments.batch_size
    if arguments.lr is not None:
        section["learning_rate"] = arguments.lr
    return parse_settings(raw, "command line")
