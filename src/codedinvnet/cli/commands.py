"""The commands of `codedinvnet`: what each takes, and the function that it calls.

Heavy imports wait until a command runs, so that --help and wrong usage answer at once.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from codedinvnet.cli.common import (
    Action,
    Option,
    flushing_denormals,
    members_of,
    opt,
    print_report,
    seed,
)
from codedinvnet.cli.options import options_of
from codedinvnet.common.errors import UserError
from codedinvnet.common.options import Options
from codedinvnet.gateway.options import GatewayOptions
from codedinvnet.serving.config import ServeOptions

if TYPE_CHECKING:
    from codedinvnet.data import ImageSource
    from codedinvnet.models.bundle import Bundle


DEVICE = opt("--device", "cpu, cuda, cuda:1", default="auto")
DATA = (
    opt("--data-dir", "folder of image sets", Path, unset="the cache, or a download"),
    opt("--download", "download into --data-dir", bool),
    DEVICE,
)
SEED = opt("--seed", "random seed", seed, 0)
JSON = opt("--json", "print one JSON object", bool)
MODEL = (
    opt("--weights", "safetensors file with the weights of a factory's module", unset="its own"),
    opt(
        "--scores",
        "output with the class scores; KIND: logits or probabilities",
        unset="found",
        metavar="NAME[:KIND]",
    ),
    opt(
        "--input",
        "an input that the model leaves open, of one query, as x:FP32:3x224x224; repeatable",
        list,
        dest="inputs",
        metavar="NAME:DATATYPE:SHAPE",
    ),
)
"""What opening a model of the user's own may need besides its name."""


def bundle_or(others: str = "") -> Option:
    """Return the positional argument of commands on a bundle, or on the others that it names."""
    return opt("bundle", f"a shipped bundle (mnist, fashion, cifar10), or a folder{others}")


class Command(NamedTuple):
    """A command, in the group in which `--help` lists it."""

    group: str
    name: str
    summary: str
    example: str
    options: tuple[Option | type[Options], ...]
    run: Action


COMMANDS: list[Command] = []
"""Those of `codedinvnet`, in the order of `--help`."""


def command(
    group: str, summary: str, example: str, *options: Option | type[Options]
) -> Callable[[Action], Action]:
    """Make a function the command of its name, with options or an option model."""

    def add(run: Action) -> Action:
        name = run.__name__.strip("_").replace("_", " ")
        COMMANDS.append(Command(group, name, summary, example, options, run))
        return run

    return add


def values(arguments: argparse.Namespace, *names: str) -> dict[str, Any]:
    """Return some of a command's options by name."""
    return {name: getattr(arguments, name) for name in names}


# serve


@command(
    "serve",
    "serve a model over HTTP (Open Inference Protocol V2), through slow and dead workers",
    "codedinvnet serve mnist --k 10 --policy coded --demo",
    ServeOptions,
)
def _serve(arguments: argparse.Namespace) -> None:
    from codedinvnet.serving.app import serve

    serve(options_of(arguments, ServeOptions))


@command(
    "serve",
    "hedge any service that speaks HTTP: send late requests to a second server, avoid slow "
    "servers, and replace dead ones",
    "codedinvnet gateway --upstream http://a:8000 --upstream http://b:8000 --port 9000",
    GatewayOptions,
)
def _gateway(arguments: argparse.Namespace) -> None:
    from codedinvnet.gateway.command import run_gateway

    run_gateway(lambda: options_of(arguments, GatewayOptions))


@command(
    "serve",
    "show the policy of a running service or gateway, or change it without losing a query",
    "codedinvnet policy http://127.0.0.1:8000 hedge",
    opt("url", "address of the service, such as http://127.0.0.1:8000"),
    opt("--token-file", "file with the service's token", Path, unset="default: none"),
    opt("policy", "the new policy", nargs="?", unset="default: show the current policy"),
)
def _policy(arguments: argparse.Namespace) -> None:
    from codedinvnet.net.admin_client import ask, read_token

    token = read_token(arguments.token_file)
    before = ask(arguments.url, "/policy", token)
    if "offered" not in before:  # a gateway passes this on to an upstream
        raise UserError(f"{arguments.url}: no policy here; a gateway's is at URL/codedinvnet")
    if arguments.policy is None:
        for name in before["offered"]:
            print(f"{'*' if name == before['policy'] else ' '} {name}")
        for name, why in before["refused"].items():
            print(f"  not {name}: {why}")
        if before["method"] is not None:
            print(f"method: {before['method']}")
        for route, proof in before.get("proof", {}).items():
            print(
                f"\n{route}: {proof['requests']} requests in {proof['window_seconds']:.0f} s, "
                f"{proof['copied']} copied and {proof['held_out']} held out.\n"
                f"Copies are {proof['attempts_share']:.1%} of what its upstreams got, and took "
                f"{proof['copy_seconds']:.1f} s, {proof['seconds_share']:.1%} of their time."
            )
            for name, title in (("p50", "p50"), ("p99", "p99"), ("p999", "p99.9")):
                shown, without = (proof["texts"][arm][name] for arm in ("copies", "without"))
                print(f"  {title:5}  {shown:32}  without copies {without}")
        return
    found = ask(arguments.url, "/policy", token, {"policy": arguments.policy})
    print(f"policy {found['policy']}, before {before['policy']}")


@command(
    "serve",
    "recover erased predictions on shipped images, and draw how",
    "codedinvnet demo",
    opt("--out", "the picture", Path, Path("demo.png")),
    SEED,
)
def _demo(arguments: argparse.Namespace) -> None:
    from codedinvnet.common.files import check_writable
    from codedinvnet.data import SAMPLES
    from codedinvnet.evaluation.demo import run_demo
    from codedinvnet.models.bundle import shipped_bundles

    check_writable(arguments.out)
    names = [name for name in SAMPLES if name in shipped_bundles()]
    run_demo(names, arguments.out, arguments.seed)


# protect

NOTHING_RECOMMENDED = 3
"""The exit status of `protect` if a copy of the model is better than any backup."""


@command(
    "protect",
    "train a small backup that answers while a model is late, from unlabelled inputs",
    "codedinvnet protect model.onnx --inputs images/ --out model-protection",
    opt("model", "FILE.onnx, or a factory package.module:function"),
    *MODEL,
    opt(
        "--inputs", "folder of images, or .npz or .npy arrays", Path, dest="queries", required=True
    ),
    opt("--out", "folder of the protection", Path, required=True),
    opt(
        "--task",
        "what the output means: classify, labels (independent ones), regress or embed",
        choices=("classify", "labels", "regress", "embed"),
        unset="classify if the file ends in a softmax or a classifier's operator, else an error",
    ),
    opt("--output", "the output to protect", unset="the only one that will do"),
    opt(
        "--tolerance",
        "with regress: by how much an answer may differ, 0.2 in the output's units or 5%% of its "
        "spread",
    ),
    opt("--cosine", "with embed: the least cosine of answers that agree", float, unset="0.9"),
    opt("--minutes", "for scoring and training together", float, 30.0),
    opt(
        "--work",
        "train one size only, this share of the model's time",
        float,
        unset="0.1, 0.25 and 0.45",
    ),
    opt("--k", "queries in a group under policy small-backup", int, 10),
    opt(
        "--preprocess",
        "makes one query of a Pillow image",
        default="",
        unset="images are resized, and bytes divided by 255",
        metavar="FILE.py:FUNCTION",
    ),
    opt("--no-flip", "do not mirror images in training", bool),
    opt("--threads", "threads to score and train with", int, unset="all cores"),
    SEED,
    JSON,
)
@flushing_denormals
def _protect(arguments: argparse.Namespace) -> int:
    import torch

    from codedinvnet.models import ModelSource
    from codedinvnet.protection.run import ProtectOptions, make_protection

    for name in ("minutes", "work", "threads"):
        if (value := getattr(arguments, name)) is not None and not 0 < value < 1e6:
            raise UserError(f"--{name}: must be above 0, got {value}")
    source = ModelSource(
        arguments.model,
        arguments.weights,
        arguments.scores,
        inputs=tuple(arguments.inputs),
        threads=arguments.threads or torch.get_num_threads(),
    )
    how = values(arguments, "out", "k", "minutes", "work", "seed", "preprocess")
    how |= values(arguments, "task", "output", "tolerance", "cosine")
    mirror = not arguments.no_flip
    found = make_protection(ProtectOptions(source, arguments.queries, mirror=mirror, **how))
    if arguments.json:
        print_report(found, as_json=True)
    else:
        print_protection(found)
    return NOTHING_RECOMMENDED if found["recommended"] is None else 0


def print_protection(found: Mapping[str, Any]) -> None:
    """Print what a protection is for a reader."""
    from codedinvnet.protection.measure import table

    if found["table"]:
        print(table(found["table"]))
    for note in [*found["notes"], *(row["note"] for row in found["table"] if "note" in row)]:
        print(note)
    limit = f", with --max-disagreement {found['limit']:g}" if found["limit"] else ""
    print(f"recommended: {found['recommended'] or 'none'}{limit}: {found['reason']}")


@command(
    "protect",
    "measure how often approximate answers disagree: a bundle's, on held-out images (the shipped "
    "ones are calibrated), or again a protection's, on newer inputs",
    "codedinvnet calibrate model-protection --inputs newer/",
    bundle_or(", or the folder of a protection"),
    opt(
        "--inputs",
        "of a protection: queries with which it was not trained, as protect takes them",
        Path,
        dest="queries",
    ),
    opt("--model", "of a protection: the protected model, if it moved", unset="where it was"),
    opt(
        "--preprocess",
        "makes one query of a Pillow image",
        default="",
        unset="as when it was protected",
        metavar="FILE.py:FUNCTION",
    ),
    *DATA,
    opt("--out", "the file", Path, unset="calibration.json next to the weights"),
    SEED,
    JSON,
)
def _calibrate(arguments: argparse.Namespace) -> int:
    from codedinvnet.common.files import check_writable
    from codedinvnet.evaluation.trust import calibrate
    from codedinvnet.protection.calibration import FILE
    from codedinvnet.protection.folder import DESCRIPTION

    if arguments.queries is not None or (Path(arguments.bundle) / DESCRIPTION).is_file():
        return _renew(arguments)
    bundle = _bundle(arguments)
    path = arguments.out or bundle.folder / FILE
    try:
        check_writable(path)
    except UserError as error:
        raise UserError(f"{error}: name another file by --out") from error
    held_out = _images(arguments, bundle, "validation")
    calibration = calibrate(bundle, held_out, arguments.seed)
    calibration.save(path)
    curves = [
        f"{kind.method}, k = {kind.k}, {kind.answer}: {curve.disagreed[-1]} of "
        f"{curve.released[-1]} disagree"
        for kind, curve in calibration.curves.items()
    ]
    print_report({"written": str(path), "images": len(held_out), "curves": curves}, arguments.json)
    return 0


def _renew(arguments: argparse.Namespace) -> int:
    from codedinvnet.protection.measure import table
    from codedinvnet.protection.renew import renew

    if arguments.queries is None:
        raise UserError("calibrate: a protection needs --inputs, queries newer than its own")
    how = {"model": arguments.model or "", "preprocess": arguments.preprocess}
    folder = Path(arguments.bundle)
    before, after = renew(folder, arguments.queries, seed=arguments.seed, **how)
    if arguments.json:
        print_report(after, as_json=True)
    else:
        print(f"before\n{table(before['table'])}\n\nnow")
        print_protection(after)
    return NOTHING_RECOMMENDED if after["recommended"] is None else 0


@command(
    "protect",
    "describe a bundle (parameters, multiply-adds, times, provenance), a protection (its table), "
    "or a model of your own: its tensors",
    "codedinvnet info mnist --json",
    bundle_or(", the folder of a protection, FILE.onnx, or a factory package.module:function"),
    *MODEL,
    DEVICE,
    JSON,
)
def _info(arguments: argparse.Namespace) -> None:
    from codedinvnet.common.files import read_json
    from codedinvnet.models import ModelSource
    from codedinvnet.protection.folder import DESCRIPTION, read_description

    if (Path(arguments.bundle) / DESCRIPTION).is_file():
        read_description(Path(arguments.bundle))
        found = read_json(Path(arguments.bundle) / DESCRIPTION)
        if arguments.json:
            print_report(found, as_json=True)
        else:
            print_protection(found)
        return

    options = values(arguments, "weights", "scores", "inputs")
    source = ModelSource(arguments.bundle, **options)
    if source.kind != "bundle" or any(options.values()):
        device = "cpu" if arguments.device == "auto" else arguments.device
        report = replace(source, device=device).open().describe()
        print_report(report if arguments.json else _lines(report), as_json=arguments.json)
        return

    from codedinvnet.evaluation.cost import info_report

    print_report(info_report(_bundle(arguments)), as_json=arguments.json)


def _lines(report: dict[str, Any]) -> dict[str, Any]:
    """Return the description of a model for a reader: a line for every tensor."""
    plain = {key: report[key] for key in ("source", "kind", "platform", "digest")}
    tensors = {
        f"{kind} {tensor['name']}": f"{tensor['datatype']} "
        f"({', '.join(map(str, ('B', *tensor['shape'])))})"
        for kind in ("input", "output")
        for tensor in report[f"{kind}s"]
    }
    scores = report["scores"]
    doubt = (
        ", if it classifies" if scores and scores["kind"] == "logits" else ""
    )  # no file proves it
    named = "none: name them by --scores"
    if scores:
        named = f"{scores['output']} ({scores['kind']}{doubt})"
    batch = report["max_batch"]
    return {**plain, **tensors, "scores": named, "batch": "any" if batch is None else batch}


# compare


@command(
    "compare",
    "compare the accuracy of all methods of a grid; rows and tables",
    "codedinvnet bench accuracy --data-dir data --only dataset=mnist --only k=10",
    opt(
        "grid",
        "methods, data sets, k, missing workers",
        Path,
        nargs="?",
        unset="JSON; default: the grid of the shipped rows",
    ),
    opt(
        "--method",
        "only this method of the grid; FILE.py:CLASS measures your own, and the table has the "
        "shipped rows of the others, too; repeatable",
        list,
        unset="all",
    ),
    opt(
        "--split",
        "images to score on; use validation while you choose",
        default="test",
        choices=("test", "validation"),
    ),
    opt(
        "--missing",
        "workers that don't answer in each group",
        int,
        unset="the grid's; 1 for a method of your own",
    ),
    opt("--save-dir", "where trained parts lie", Path, Path("runs")),
    opt(
        "--only",
        "only what has this method, dataset, base, k, missing or seed; repeatable",
        list,
        unset="all",
        metavar="KEY=VALUE",
    ),
    opt("--out", "rows; finished ones are kept", Path, unset="results/accuracy.jsonl"),
    opt("--quick", "minutes: short trainings, 1,000 images", bool),
    *DATA,
    JSON,
)
@flushing_denormals
def _bench_accuracy(arguments: argparse.Namespace) -> None:
    from codedinvnet.common.grid import refuse_failures
    from codedinvnet.evaluation import methods, tables
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
        **values(
            arguments, "split", "save_dir", "data_dir", "download", "quick", "only", "missing"
        ),
    )
    compare = any(map(is_foreign, arguments.method)) and not validation
    written = tables.write_accuracy(out, compare)
    if not arguments.json:
        print(tables.brief(tables.shown_frame(out, compare)))
        if compare and arguments.quick:
            print("Your own method was measured in short, and the others are shipped rows.")
    where = {"rows": str(out), "written": [str(path) for path in written]}
    print_report({**report, **where}, arguments.json)
    refuse_failures(report["failed"], "of the trials", out)


POLICY = (
    "uncoded, replicate, hedge, coded, coded+hedge, coded by a method: its name, or FILE.py:CLASS, "
    " METHOD+hedge, auto, or auto+METHOD"
)
STRAGGLERS = (
    "none, held, exponential, pareto, slower, bursts, hung, or a faults file without corrupt, "
    "from_task, until_task and each_image"
)
ITS = {"unset": "the scenario's"}
GATEWAYS = (
    opt("--gateways", "number of gateways before the same servers (with cores)", int, **ITS),
    opt(
        "--message-ms",
        "way of a message to or from the scheduler that the gateways share",
        float,
        unset="the scenario's, or each gateway decides alone",
    ),
)


@command(
    "compare",
    "simulate the service with its own rules, at any number of workers",
    "codedinvnet simulate configs/bench/simulate-pareto.json --policy hedge --workers 1000",
    opt("scenario", "scenario (JSON; see configs/bench)", Path),
    opt("--policy", POLICY, **ITS),
    opt("--workers", "number of workers", int, **ITS),
    opt("--k", "queries in a coding group", int, **ITS),
    opt("--r", "parity queries in a coding group", int, **ITS),
    opt("--qps", "images a second", float, **ITS),
    opt("--batch", "images of a request", int, **ITS),
    opt("--worker-batch", "data tasks of a call, as serve's", int, **ITS),
    *GATEWAYS,
    opt("--extra", "extra work per query, at most, as serve's", float, **ITS),
    opt("--queries", "images in all", int, **ITS),
    opt("--seed", "random seed", int, **ITS),
    opt("--stragglers", STRAGGLERS, **ITS),
    JSON,
)
def _simulate(arguments: argparse.Namespace) -> None:
    from codedinvnet.simulation.run import run_simulate

    _show(arguments.json, *run_simulate(**_given(arguments)))


@command(
    "compare",
    "compare policies on numbers of machines for a latency log or a scenario, by simulation",
    "codedinvnet plan log.csv --qps 200 --p999-ms 150",
    opt(
        "source",
        "latency log (.csv with a line worker,ms for each task: from when the worker began it "
        "to when it ended, without waiting) or scenario (.json)",
        Path,
    ),
    opt("--qps", "images a second", float, **ITS),
    opt("--p999-ms", "target: what p99.9 of the latencies may be, in ms", float),
    opt(
        "--workers",
        "number of machines, repeatable",
        list,
        unset="with a target the fewest that meet it, else numbers that are 80 to 20 %% busy",
        type=int,
    ),
    opt(
        "--policy",
        f"{POLICY}; repeatable",
        list,
        unset="uncoded, replicate, hedge, small-backup, small-backup+hedge and auto, with a bundle "
        "also coded and coded+hedge",
    ),
    opt("--k", "queries in a coding group, and 1/k may be copied", int, unset="10"),
    opt("--bundle", "bundle whose code is compared as well", **ITS),
    opt("--encode-ms", "encoding, for each image of a group", float, **ITS),
    opt("--stragglers", STRAGGLERS, unset="those of the log or the scenario"),
    opt("--batch", "images of a request", int, unset="the scenario's, or 1"),
    opt("--extra", "extra work per query, at most, as serve's", float, unset="its own"),
    *GATEWAYS,
    opt("--deadline-ms", "as serve's", float, unset="5000"),
    opt("--hang-timeout-ms", "as serve's", float, unset="0.6 of the deadline, at least 1000"),
    opt("--queries", "images of a run", int, unset="those of 53000 requests"),
    opt("--seed", "random seed", int, unset="0"),
    opt("--out", "write the scenario, for simulate", Path),
    JSON,
)
def _plan(arguments: argparse.Namespace) -> None:
    from codedinvnet.simulation.compare import run_plan

    _show(arguments.json, *run_plan(**_given(arguments)))


def _given(arguments: argparse.Namespace) -> dict[str, Any]:
    """Return options whose names are the arguments of the function that is called."""
    return {key: value for key, value in vars(arguments).items() if key not in ("run", "json")}


def _show(as_json: bool, report: dict[str, Any], lines: list[str]) -> None:
    print(json.dumps(report) if as_json else "\n".join(lines))


@command(
    "compare",
    "erase every member of every group and score the decoded answers",
    "codedinvnet evaluate mnist --k 10 --data-dir data --json",
    bundle_or(),
    *DATA,
    opt("--k", "group size", int, 10),
    opt(
        "--split",
        "which images; sample: the 1,000 in the package, of mnist and fashion",
        default="test",
        choices=("test", "validation", "train", "sample"),
    ),
    SEED,
    opt("--groupings", "random groupings to average", int, 5),
    opt(
        "--method",
        "another method around the bundle's networks that needs no training, such as "
        "average-image; or FILE.py:CLASS",
        default="coded-invnet",
    ),
    opt("--shuffle-parity", "decode with another group's parity output", bool),
    JSON,
)
def _evaluate(arguments: argparse.Namespace) -> None:
    from codedinvnet.codes.build import scheme_for
    from codedinvnet.evaluation.accuracy import evaluation_report

    bundle = _bundle(arguments)
    scheme_for(bundle, arguments.k, arguments.method)  # or refuse now
    names = ("split", "k", "groupings", "seed", "method", "shuffle_parity")
    images = _images(arguments, bundle, arguments.split)
    report = evaluation_report(bundle, images, **values(arguments, *names))
    print_report(report, as_json=arguments.json)


@command(
    "compare",
    "invert the network on real images and measure its Lipschitz bound",
    "codedinvnet invert mnist --data-dir data --json",
    bundle_or(),
    *DATA,
    opt("--split", "images", default="test", choices=("test", "sample")),
    opt("--tolerance", "of each block, above 0", float, 1e-6),
    opt("--limit", "only the first images", int, unset="all"),
    JSON,
)
def _invert(arguments: argparse.Namespace) -> None:
    from codedinvnet.evaluation.inversion import inversion_report

    bundle = _bundle(arguments)
    source = _images(arguments, bundle, arguments.split)
    report = inversion_report(bundle.model, source, **values(arguments, "tolerance", "limit"))
    print_report({"bundle": bundle.info.name, "split": arguments.split, **report}, arguments.json)


def _bundle(arguments: argparse.Namespace) -> Bundle:
    from codedinvnet.evaluation.stages import choose_device
    from codedinvnet.models.bundle import load_bundle

    return load_bundle(arguments.bundle, choose_device(arguments.device))


def _images(arguments: argparse.Namespace, bundle: Bundle, split: str) -> ImageSource:
    from codedinvnet.evaluation.stages import evaluation_images

    return evaluation_images(bundle, split, arguments.data_dir, arguments.download)


# paper


@command(
    "paper",
    "train a bundle by a settings file, finished stages kept, and evaluate on the test split",
    "codedinvnet reproduce configs/alone/mnist.json --data-dir data",
    opt("config", "settings file (JSON)", Path),
    opt("--save-dir", "folder of runs", Path, Path("runs")),
    *DATA,
    opt("--seed", "another seed than the settings'; the run folder is NAME-seedSEED", int),
    opt("--k", "group size", int, unset="the settings' fusion.members"),
    opt("--fresh", "start over instead of resuming", bool),
    JSON,
)
@flushing_denormals
def _reproduce(arguments: argparse.Namespace) -> None:
    from codedinvnet.common.config import load_settings, with_seed
    from codedinvnet.common.files import check_folder
    from codedinvnet.evaluation import stages

    check_folder(arguments.save_dir, "--save-dir")
    settings = load_settings(arguments.config)
    if arguments.seed is not None:
        settings = with_seed(settings, arguments.seed)
    run = stages.Run(
        settings,
        device=stages.choose_device(arguments.device),
        resume=0 if arguments.fresh else -1,
        **values(arguments, "save_dir", "data_dir", "download"),
    )
    members = members_of(run.settings, arguments.k)
    print_report(stages.reproduce(run, members), as_json=arguments.json)
