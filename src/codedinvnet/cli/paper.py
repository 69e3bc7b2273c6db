"""The paper's command line, the one of `main.py`."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from codedinvnet.cli.common import flushing_denormals, guarded, members_of, print_report
from codedinvnet.common.errors import UserError

if TYPE_CHECKING:
    from codedinvnet.common.config import Settings

EXAMPLES = """the four commands of the paper:
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
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--config_file", type=Path, required=True, help="settings file (JSON)")
    places = "data, if it is there; else the cache; what is missing is downloaded"
    add("--data_dir", "--data-dir", type=Path, help=f"folder of image sets ({places})")
    add("--save_dir", type=Path, default=Path("runs"), help="folder of runs (runs)")
    add("--batch_size", type=int, help="of the stage that runs (from the settings)")
    add("--lr", type=float, help="learning rate of the stage that runs (from the settings)")
    add("--resume", type=int, default=0, help="epoch to go on from; 0: from the start")
    add("--nactors", type=int, help="k, the queries in a group (the settings' fusion.members)")
    add("--nsteps_save", type=int, help="batches of 128 targets in one saved shard (16)")
    add("-fusion", action="store_true", help="the fusion stages instead of the network's")
    add("-sample_fusion", action="store_true", help="with -fusion: generate the data set")
    add("-test_fusion", action="store_true", help="with -fusion: evaluate on the test split")
    add("-test_inversion", action="store_true", help="invert the trained network on the test split")
    add("--device", default="auto", help="cpu, cuda, cuda:1 (auto)")
    arguments = parser.parse_args(argv)
    kept = "finished epochs and shards are kept: --resume goes on"
    return guarded(lambda: _paper(arguments), kept)


@flushing_denormals
def _paper(arguments: argparse.Namespace) -> None:
    from codedinvnet.common.files import check_folder
    from codedinvnet.evaluation import stages

    if (arguments.sample_fusion or arguments.test_fusion) and not arguments.fusion:
        raise UserError("-sample_fusion and -test_fusion go with -fusion")
    if arguments.sample_fusion and arguments.test_fusion:
        raise UserError("-sample_fusion and -test_fusion are two commands")
    if arguments.test_inversion and arguments.fusion:
        raise UserError("-test_inversion is of the network: it does not go with -fusion")
    shards = {} if arguments.nsteps_save is None else {"shard_batches": arguments.nsteps_save}
    if arguments.resume < 0 or any(batches < 1 for batches in shards.values()):
        raise UserError("--resume must be 0 or an epoch, --nsteps_save at least 1")
    _refuse_idle(arguments)
    check_folder(arguments.save_dir, "--save_dir")
    run = stages.Run(
        settings=_paper_settings(arguments),
        save_dir=arguments.save_dir,
        data_dir=arguments.data_dir or (Path("data") if Path("data").is_dir() else None),
        device=stages.choose_device(arguments.device),
        download=arguments.data_dir is None,
        resume=arguments.resume,
    )
    members = members_of(run.settings, arguments.nactors)
    if arguments.fusion:
        if arguments.sample_fusion:
            report = stages.sample(run, members, **shards)
        elif arguments.test_fusion:
            report = stages.test_fusion(run, members)
        else:
            report = stages.fuse(run, members)
    elif arguments.test_inversion:
        report = stages.test_inversion(run)
    else:
        header = stages.train(run)
        report = {"network": str(run.network_folder), **header["validation"]}
    print_report(report, as_json=False)


def _refuse_idle(arguments: argparse.Namespace) -> None:
    """Refuse flags that would change nothing of the stage that runs."""
    tests = arguments.test_fusion or arguments.test_inversion
    trains = not (tests or arguments.sample_fusion)
    given = {
        "--lr": arguments.lr is not None and not trains,
        "--batch_size": arguments.batch_size is not None and not trains,
        "--resume": arguments.resume != 0 and tests,
        "--nsteps_save": arguments.nsteps_save is not None and not arguments.sample_fusion,
        "--nactors": arguments.nactors is not None and not arguments.fusion,
    }
    for flag, idle in given.items():
        if idle:
            raise UserError(f"{flag} changes nothing of this stage: leave it out")


def _paper_settings(arguments: argparse.Namespace) -> Settings:
    """Apply the flags to the stage that runs."""
    from codedinvnet.common.config import load_settings, parse_settings

    raw = load_settings(arguments.config_file).model_dump(mode="json")
    section = raw["fusion" if arguments.fusion else "training"]
    for flag, value, key in (
        ("--batch_size", arguments.batch_size, "batch_size"),
        ("--lr", arguments.lr, "learning_rate"),
    ):
        if value is not None and section.get("joint_epochs"):
            raise UserError(
                f"{flag}: this fusion has two phases, with fusion.{key} and fusion.joint_{key}: "
                f"change them in {arguments.config_file}"
            )
    if arguments.batch_size is not None:
        section["batch_size"] = arguments.batch_size
    if arguments.lr is not None:
        section["learning_rate"] = arguments.lr
    return parse_settings(raw, "command line")
