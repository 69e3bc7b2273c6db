"""The commands that train: `train`, `sample`, `fuse`, and `reproduce`, which runs them all."""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from codedinvnet.cli.common import (
    Commands,
    add_command,
    add_data_options,
    flushing_denormals,
    members_of,
    print_report,
)

if TYPE_CHECKING:
    from codedinvnet.stages import Run

CONFIG = "configs/mnist-recovery.json --data-dir data"


def add_stages(commands: Commands) -> None:
    """Add the command of each stage."""
    train = add_command(
        commands,
        "train",
        _train,
        "train the invertible network",
        f"codedinvnet train {CONFIG}",
    )
    sample = add_command(
        commands,
        "sample",
        _sample,
        "generate the fusion data set of the paper's objective",
        "codedinvnet sample configs/mnist.json --k 2 --data-dir data",
    )
    fuse = add_command(
        commands, "fuse", _fuse, "train the fusion encoder", f"codedinvnet fuse {CONFIG}"
    )
    for sub in (train, sample, fuse):
        _add_config_options(sub)
        sub.add_argument("--resume", action="store_true", help="go on from the newest checkpoint")
        add_data_options(sub)
    for sub in (sample, fuse):
        sub.add_argument("--k", type=int, help="group size (the settings' fusion.members)")


def add_reproduce(commands: Commands) -> None:
    """Add `reproduce`."""
    sub = add_command(
        commands,
        "reproduce",
        _reproduce,
        "run all stages of a settings file, finished ones kept, and evaluate on the test split",
        f"codedinvnet reproduce {CONFIG}",
    )
    _add_config_options(sub)
    add_data_options(sub)
    sub.add_argument(
        "--seed", type=int, help="another seed than the settings'; the run folder is NAME-seedSEED"
    )
    sub.add_argument("--k", type=int, help="group size (the settings' fusion.members)")
    sub.add_argument("--fresh", action="store_true", help="start over instead of resuming")
    sub.add_argument("--json", action="store_true", help="print one JSON object")


def _add_config_options(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("config", type=Path, help="settings file (JSON)")
    sub.add_argument(
        "--save-dir", type=Path, default=Path("runs"), help="where run folders lie (runs)"
    )


def _run_of(arguments: argparse.Namespace, resume: int) -> Run:
    from codedinvnet.config import load_settings
    from codedinvnet.files import check_folder
    from codedinvnet.stages import Run, choose_device

    check_folder(arguments.save_dir, "--save-dir")
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


@flushing_denormals
def _train(arguments: argparse.Namespace) -> None:
    from codedinvnet import stages

    run = _resumable_run(arguments)
    print_report(
        {"network": str(run.network_folder), **stages.train(run)["validation"]}, as_json=False
    )


@flushing_denormals
def _sample(arguments: argparse.Namespace) -> None:
    from codedinvnet import stages

    run = _resumable_run(arguments)
    print_report(stages.sample(run, members_of(run.settings, arguments.k)), as_json=False)


@flushing_denormals
def _fuse(arguments: argparse.Namespace) -> None:
    from codedinvnet import stages

    run = _resumable_run(arguments)
    print_report(stages.fuse(run, members_of(run.settings, arguments.k)), as_json=False)


@flushing_denormals
def _reproduce(arguments: argparse.Namespace) -> None:
    from codedinvnet import stages
    from codedinvnet.config import with_seed

    run = _run_of(arguments, 0 if arguments.fresh else -1)
    if arguments.seed is not None:
        run = replace(run, settings=with_seed(run.settings, arguments.seed))
    members = members_of(run.settings, arguments.k)
    print_report(stages.reproduce(run, members), as_json=arguments.json)
