"""The paper's command line, the one of `main.py`."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

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
    add("-fusion", action="store_true", help="the fusion stages instead of the network's")
    add("-sample_fusion", action="store_true", help="with -fusion: generate the data set")
    add("-test_fusion", action="store_true", help="with -fusion: evaluate on the test split")
    add("-test_inversion", action="store_true", help="invert the trained network on the test split")
    add("--device", default="auto", help="cpu, cuda, cuda:1 (auto)")
    arguments = parser.parse_args(argv)
    kept = "finished epochs are kept: --resume goes on"
    return guarded(lambda: _paper(arguments), kept)


SWITCHES = ("fusion", "sample_fusion", "test_fusion", "test_inversion")
STAGES = {
    (): ("train", ("batch_size", "lr", "resume")),
    ("fusion", "sample_fusion"): ("sample", ("resume", "nactors")),
    ("fusion",): ("fuse", ("batch_size", "lr", "resume", "nactors")),
    ("fusion", "test_fusion"): ("test_fusion", ("nactors",)),
    ("test_inversion",): ("test_inversion", ()),
}
"""The switches of each stage, its function, and the flags that change something of it."""


@flushing_denormals
def _paper(arguments: argparse.Namespace) -> None:
    from codedinvnet.common.files import check_folder
    from codedinvnet.evaluation import stages

    switches = tuple(name for name in SWITCHES if getattr(arguments, name))
    if switches not in STAGES:
        raise UserError(
            f"-{' -'.join(switches)} is no stage: -sample_fusion and -test_fusion each go with "
            "-fusion, and -test_inversion stands alone"
        )
    stage, flags = STAGES[switches]
    for flag in ("batch_size", "lr", "resume", "nactors"):
        if getattr(arguments, flag) not in (None, 0) and flag not in flags:
            raise UserError(f"--{flag} changes nothing of this stage: leave it out")
    if arguments.resume < 0:
        raise UserError("--resume must be 0 or an epoch")
    check_folder(arguments.save_dir, "--save_dir")
    run = stages.Run(
        settings=_paper_settings(arguments),
        save_dir=arguments.save_dir,
        data_dir=arguments.data_dir or (Path("data") if Path("data").is_dir() else None),
        device=stages.choose_device(arguments.device),
        download=arguments.data_dir is None,
        resume=arguments.resume,
    )
    given: dict[str, Any] = {}
    if arguments.fusion:
        given["members"] = members_of(run.settings, arguments.nactors)
    report = getattr(stages, stage)(run, **given)
    if stage == "train":
        report = {"network": str(run.network_folder), **report["validation"]}
    print_report(report, as_json=False)


def _paper_settings(arguments: argparse.Namespace) -> Settings:
    """Apply the flags to the stage that runs."""
    from codedinvnet.common.config import load_settings, parse_settings

    raw = load_settings(arguments.config_file).model_dump(mode="json")
    section = raw["fusion" if arguments.fusion else "training"]
    for flag, key in (("batch_size", "batch_size"), ("lr", "learning_rate")):
        if (value := getattr(arguments, flag)) is None:
            continue
        if section.get("joint_epochs"):
            raise UserError(
                f"--{flag}: this fusion has two phases, with fusion.{key} and fusion.joint_{key}: "
                f"change them in {arguments.config_file}"
            )
        section[key] = value
    return parse_settings(raw, "command line")
