"""The stages of a run, in the order of the paper: train, sample, fuse, evaluate.

`main.py` and the project's own command line both call these; everything that a stage leaves lies in
`<save_dir>/<name>/`.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from codedinvnet.codes.invnet import own_scheme
from codedinvnet.common.config import (
    OBJECTIVE_VERSION,
    DataSettings,
    FusionSettings,
    PixelFusionSettings,
    RecoveryFusionSettings,
    Settings,
    with_members,
)
from codedinvnet.common.devices import use_whole_float32
from codedinvnet.common.errors import UserError
from codedinvnet.common.files import free_backup_name, read_json, write_json
from codedinvnet.common.progress import Progress
from codedinvnet.data import (
    ImageRows,
    ImageSource,
    Split,
    load_images,
    sample_images,
    split_images,
)
from codedinvnet.evaluation.accuracy import evaluation_report
from codedinvnet.evaluation.inversion import inversion_report
from codedinvnet.models.bundle import (
    BUNDLE_VERSION,
    Bundle,
    BundleInfo,
    InputDescription,
    Provenance,
    load_bundle,
    save_bundle,
    usable_device,
    write_description,
)
from codedinvnet.models.checkpoint import load_checkpoint
from codedinvnet.models.coded import CodedModel, model_settings
from codedinvnet.nn.iresnet import IResNet
from codedinvnet.nn.lipschitz import constrain_exactly
from codedinvnet.training.fusion_data import load_fusion_data, sample_fusion_data
from codedinvnet.training.images import (
    bundle_split,
    check_images,
    check_settings,
    validation_digests,
)
from codedinvnet.training.loop import (
    LAST,
    LATEST,
    NETWORK_WEIGHTS,
    ORIGIN,
    Stage,
    check_alike,
    set_aside,
    starts_over,
    train_stage,
)
from codedinvnet.training.network import (
    NETWORK,
    as_trained,
    check_network_images,
    load_trained_network,
    train_network,
)
from codedinvnet.training.pixels import UNET_VERSION, PixelStage
from codedinvnet.training.recovery import phases

SAMPLED = "sample.json"
"""In a fusion's folder: what is told of its fusion data."""


@dataclass(frozen=True)
class Run:
    """Settings and places of one run.

    Attributes:
        settings: the validated settings.
        save_dir: where run folders lie.
        data_dir: where the image sets lie (None: the usual places, then a download).
        download: whether to download into an explicit `data_dir`.
        device: what to compute on.
        resume: 0 from the start, n from the checkpoint after epoch n, -1 from the newest.
        shared_network: where the trained network lies, if runs share it.
    """

    settings: Settings
    save_dir: Path
    data_dir: Path | None
    device: torch.device
    download: bool = False
    resume: int = 0
    shared_network: Path | None = None

    @property
    def folder(self) -> Path:
        """The run's own folder."""
        return self.save_dir / self.settings.name

    @property
    def network_folder(self) -> Path:
        """Where the trained network lies."""
        return self.shared_network or self.folder / "network"

    def fusion_folder(self, members: int) -> Path:
        """Where the fusion data set and encoder for groups of `members` lie."""
        return self.folder / f"fusion-k{members}"

    def images(self, split: Split) -> ImageSource:
        """Read the image set."""
        return images_of(self.settings.data, split, self.data_dir, self.download)


def images_of(
    data: DataSettings, split: Split, data_dir: Path | None, download: bool
) -> ImageSource:
    """Read the image set of settings."""
    return load_images(data.name, split, data_dir=data_dir, download=download)


def choose_device(name: str) -> torch.device:
    """Turn a device's name, or "auto", into a device that is there (`bundle.usable_device`).

    This process computes in whole float32 from then on.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    device = usable_device(name)
    use_whole_float32()
    return device


def train(run: Run, members: int | None = None) -> dict[str, Any]:
    """Stage 1: train the invertible network and its head.

    What the later stages could not do with groups of so many members is refused now.
    """
    source = run.images("train")
    check_settings(run.settings, source, members or run.settings.fusion.members)
    return train_network(
        run.settings, source, run.network_folder, device=run.device, resume=run.resume
    )


def sample(run: Run, members: int) -> dict[str, Any]:
    """Stage 2: generate the fusion data set (the paper's objective alone needs one)."""
    source, folder = run.images("train"), run.fusion_folder(members)
    check_settings(run.settings, source, members)
    report = sample_fusion_data(
        run.settings,
        source,
        run.network_folder,
        folder,
        members=members,
        device=run.device,
        resume=run.resume != 0,
    )
    write_json(folder / SAMPLED, report)
    return report


def fuse(run: Run, members: int) -> dict[str, Any]:
    """Stage 3: train the fusion encoder, and write the bundle to `<fusion folder>/bundle`."""
    source = run.images("train")
    check_settings(run.settings, source, members)
    model, trained = load_trained_network(run.settings, run.network_folder, run.device)
    check_network_images(source, trained)
    named = as_trained(run.settings, run.network_folder, trained)
    settings = with_members(named, members)
    run = replace(run, settings=settings)
    fusion = settings.fusion
    recovery = isinstance(fusion, RecoveryFusionSettings)
    folder = run.fusion_folder(members)
    weights = trained[NETWORK_WEIGHTS]
    stamp = {
        **named.model_dump(mode="json"),
        "members": members,
        NETWORK_WEIGHTS: weights,
        **({} if recovery else {"objective_version": OBJECTIVE_VERSION}),
        **({"unet_version": UNET_VERSION} if fusion.encoder.kind == "unet" else {}),
    }
    bundle, seconds = folder / "bundle", float(trained["seconds"])
    phases = _phases(run, fusion, model, source, weights)
    for number, (place, epochs, resume, stage) in enumerate(phases):
        if number == 0 and starts_over(place, resume) and bundle.is_dir():
            kept = free_backup_name(bundle)  # until this one ends, there is none to test
            bundle.rename(kept)
            Progress.write(f"{bundle}: trained again; the old one is in {kept}", file=sys.stderr)
        header = train_stage(
            stage, place, epochs=epochs, seed=settings.seed, settings=stamp, resume=resume
        )
        seconds += float(header["seconds"])
    figures = header["validation"]
    if recovery and isinstance(model.network, IResNet):
        constrain_exactly(model.network)
        figures = dict(stage.validate()[1])
    info = BundleInfo(
        format_version=BUNDLE_VERSION,
        name=settings.data.name,
        input=InputDescription(shape=source.shape, padding=settings.data.padding),
        classes=source.classes,
        group_sizes=tuple(range(2, members + 1)) if recovery else (members,),
        model=model_settings(settings, source.shape, source.classes),
        provenance=Provenance(
            **header[ORIGIN],
            data=f"{source.name}, {len(source)} training images",
            images=source.digest(),
            seconds=round(seconds, 1),
            settings=settings,
        ),
        figures={"validation": figures},
    )
    save_bundle(bundle, info, model, validation_digests(settings, source))
    return {"bundle": str(bundle), **figures}


def _phases(
    run: Run, fusion: FusionSettings, model: CodedModel, source: ImageSource, weights: str
) -> Iterator[tuple[Path, int, int, Stage]]:
    """Yield folder, epochs, epoch to resume and stage of each phase of the fusion training.

    A stage is made only when the one before it has ended, since it starts from that one's weights.
    """
    settings, folder = run.settings, run.fusion_folder(fusion.members)
    if isinstance(fusion, PixelFusionSettings):
        data = load_fusion_data(settings, folder, fusion.members, weights)
        validation = split_images(settings, source)[1]
        scheme, seed = own_scheme(model, fusion.members), settings.seed
        paper = PixelStage(fusion, source, model, data, validation, scheme, seed=seed)
        yield folder, fusion.epochs, run.resume, paper
        return
    epochs = {"recovery": fusion.epochs, "joint": fusion.joint_epochs}
    started = [n for n, count in epochs.items() if count and (folder / n / LAST).is_file()]
    if run.resume > 0 and not started:
        raise UserError(f"cannot resume epoch {run.resume}: there is no checkpoint in {folder}")
    if not run.resume:
        for name in started:
            set_aside(folder / name)
    schemes = {k: own_scheme(model, k) for k in sorted({2, fusion.members})}
    images = split_images(settings, source)
    for stage, count in phases(fusion, settings.training, *images, model, schemes):
        # An epoch to resume is one of the phase that was under way; finished phases are kept.
        newest = started and stage.name == started[-1]
        resume = run.resume if newest or not run.resume else LATEST
        yield folder / stage.name, count, resume, stage


def test_fusion(run: Run, members: int) -> dict[str, Any]:
    """Stage 4: evaluate the trained fusion encoder on the test split."""
    folder = run.fusion_folder(members) / "bundle"
    if not folder.is_dir():
        raise UserError(f"no trained fusion encoder at {folder}: train it first (main.py -fusion)")
    bundle = load_bundle(folder, run.device)
    _, network = load_checkpoint(run.network_folder / NETWORK)
    wanted = with_members(as_trained(run.settings, run.network_folder, network), members)
    trained = with_members(bundle.info.provenance.settings, members)
    before, now = (one.model_dump(mode="json") for one in (trained, wanted))
    now["name"] = before["name"]
    for key in ("batch_size", "learning_rate"):  # which flags of main.py may have changed
        now["fusion"][key] = before["fusion"].get(key)
    check_alike(folder, before, now, "train it again (main.py -fusion)")
    phase = ""
    if isinstance(wanted.fusion, RecoveryFusionSettings):
        phase = "joint" if wanted.fusion.joint_epochs else "recovery"
    last = run.fusion_folder(members) / phase / LAST
    weights = network[NETWORK_WEIGHTS]
    if last.is_file() and load_checkpoint(last)[1]["settings"][NETWORK_WEIGHTS] != weights:
        raise UserError(
            f"{last.parent} was trained for another network than {run.network_folder / NETWORK}: "
            "train it again (main.py -fusion, and before it -sample_fusion if it needs that)"
        )
    source = run.images("test")
    check_images(source, bundle.info.input.shape, bundle.info.classes, "the fusion encoder")
    began = time.monotonic()
    report = evaluation_report(bundle, source, split="test", k=members)
    seconds = {"train": network["seconds"]}
    sampled = run.fusion_folder(members) / SAMPLED
    if sampled.is_file():
        seconds["sample"] = read_json(sampled).get("seconds", 0.0)
    seconds["fuse"] = bundle.info.provenance.seconds - network["seconds"]
    seconds["evaluate"] = time.monotonic() - began
    report["seconds"] = {stage: round(value) for stage, value in seconds.items()}
    write_json(run.fusion_folder(members) / "evaluation.json", report)
    return report


def test_inversion(run: Run) -> dict[str, Any]:
    """Invert the trained network on the test split."""
    model, _ = load_trained_network(run.settings, run.network_folder, run.device)
    source = run.images("test")
    check_images(source, model.image_shape, model.classes, "the trained network")
    return inversion_report(model, source)


def reproduce(run: Run, members: int) -> dict[str, Any]:
    """Run all stages that are not finished, evaluate on the test split, and complete the bundle.

    Returns:
        Where the bundle lies, the seed, settings and seconds of its training, and
        `evaluation_report` for groups of `members` and each of the sizes 2, 4 and 10 that it
        serves.
    """
    source = run.images("test")  # before the hours of training
    trained_on = run.images("train")
    check_images(source, trained_on.shape, trained_on.classes, "the network")
    if len(source) < members:
        raise UserError(f"groups of {members} cannot be drawn from {len(source)} test images")
    train(run, members)
    pixels = isinstance(run.settings.fusion, PixelFusionSettings)
    sampling = sample(run, members)["seconds"] if pixels else 0.0
    fuse(run, members)
    folder = run.fusion_folder(members) / "bundle"
    bundle = load_bundle(folder, run.device)
    sizes = sorted({members, *{2, 4, 10}.intersection(bundle.info.group_sizes)})
    figures = {f"test_k{k}": evaluation_report(bundle, source, split="test", k=k) for k in sizes}
    info = bundle.info.model_copy(update={"figures": {**bundle.info.figures, **figures}})
    write_description(folder, info)
    return {
        "bundle": str(folder),
        "training_seed": run.settings.seed,
        "settings": run.settings.model_dump(mode="json"),
        "seconds": round(bundle.info.provenance.seconds + sampling, 1),
        **figures,
    }


def evaluation_images(
    bundle: Bundle, split: str, data_dir: Path | None, download: bool = False
) -> ImageSource:
    """Read the images that a bundle is evaluated on: test, train, validation or sample.

    Training and validation images are told apart by `bundle_split`.
    """
    data = bundle.info.provenance.settings.data
    if split == "sample":
        source: ImageSource = sample_images(data.name)
    else:
        source = images_of(data, "test" if split == "test" else "train", data_dir, download)
    described = bundle.info
    check_images(source, described.input.shape, described.classes, f"bundle {described.name!r}")
    if split in ("train", "validation"):
        train_rows, validation_rows = bundle_split(bundle, source, f"bundle {described.name!r}")
        rows = train_rows if split == "train" else validation_rows
        source = ImageRows(source, rows, f"{source.source}, {split} part")
    return source
