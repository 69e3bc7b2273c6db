"""The command `reproduce`; `main.py` runs the stages of a training one by one."""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

from codedinvnet.cli.common import (
    Commands,
    add_command,
    add_data_options,
    flushing_denormals,
    members_of,
    print_report,
)


def add_commands(commands: Commands) -> None:
    """Add `reproduce`."""
    sub = add_command(
        commands,
        "reproduce",
        _reproduce,
        "train a bundle by a settings file, finished stages kept, and evaluate on the test split",
        "codedinvnet reproduce configs/mnist-recovery.json --data-dir data",
    )
    add = sub.add_argument
    add("config", type=Path, help="settings file (JSON)")
    add("--save-dir", type=Path, default=Path("runs"), help="folder of runs (runs)")
    add_data_options(sub)
    seed = "another seed than the settings'; the run folder is NAME-seedSEED"
    add("--seed", type=int, help=seed)
    add("--k", type=int, help="group size (the settings' fusion.members)")
    add("--fresh", action="store_true", help="start over instead of resuming")
    add("--json", action="store_true", help="print one JSON object")


@flushing_denormals
def _reproduce(arguments: argparse.Namespace) -> None:
    from codedinvnet.common.config import load_settings, with_seed
    from codedinvnet.common.files import check_folder
    from codedinvnet.evaluation import stages

    check_folder(arguments.save_dir, "--save-dir")
    run = stages.Run(
        settings=load_settings(arguments.config),
        save_dir=arguments.save_dir,
        data_dir=arguments.data_dir,
        device=stages.choose_device(arguments.device),
        download=arguments.download,
        resume=0 if arguments.fresh else -1,
    )
    if arguments.seed is not None:
        run = replace(run, settings=with_seed(run.settings, arguments.seed))
    members = members_of(run.settings, arguments.k)
    print_report(stages.reproduce(run, members), as_json=arguments.json)
