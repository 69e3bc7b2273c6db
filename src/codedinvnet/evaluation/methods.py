"""`codedinvnet bench accuracy`: every method on every data set, one resumable grid."""

from __future__ import annotations

import time
import warnings
from collections.abc import Collection, Iterable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from codedinvnet import study
from codedinvnet.codes.equal_cost import direct_macs, extra_macs
from codedinvnet.codes.registry import find_method
from codedinvnet.codes.rules import is_systematic
from codedinvnet.config import PartSettings, PixelFusionSettings
from codedinvnet.data import (
    SAMPLES,
    ImageSet,
    ImageSource,
    load_images,
    sample_images,
    spread_rows,
)
from codedinvnet.errors import UserError
from codedinvnet.evaluation.erasures import Score, score
from codedinvnet.evaluation.outputs import direct_answers, task_outputs
from codedinvnet.evaluation.parts import DataSet, Scored
from codedinvnet.evaluation.trials import (
    AccuracyGrid,
    Trial,
    check_parts,
    check_possible,
    is_foreign,
    load_grid,
    needs_training_images,
    trials,
    with_methods,
)
from codedinvnet.files import check_folder, check_writable
from codedinvnet.models.bundle import Bundle, load_bundle
from codedinvnet.rows import current_accuracy, key_of, newest, read_rows

QUICK_TEST_IMAGES = 1000
QUICK_TRAINING_IMAGES = 2000
QUICK_STEPS = 10
"""Of each trained part."""
QUICK_SEEDS = 1


def quick_grid(grid: AccuracyGrid) -> AccuracyGrid:
    """Return a grid of the same trials that takes minutes: short trainings, one seed."""

    def shorter(part: PartSettings) -> PartSettings:
        steps = min(QUICK_STEPS, part.steps_per_epoch)
        return part.model_copy(update={"epochs": 1, "steps_per_epoch": steps})

    def fewer(paper: PixelFusionSettings) -> PixelFusionSettings:
        groups = min(QUICK_STEPS * paper.batch_size, paper.groups)
        return paper.model_copy(update={"epochs": 1, "groups": groups})

    datasets = {
        name: settings.model_copy(
            update={
                "classifier": settings.classifier and shorter(settings.classifier),
                "backup": shorter(settings.backup),
                "parity": settings.parity and shorter(settings.parity),
                "paper": settings.paper and fewer(settings.paper),
            }
        )
        for name, settings in grid.datasets.items()
    }
    blocks = tuple(
        block.model_copy(update={"seeds": block.seeds[:QUICK_SEEDS]}) for block in grid.blocks
    )
    return grid.model_copy(update={"datasets": datasets, "blocks": blocks, "groupings": 1})


def few_images(source: ImageSource, count: int) -> ImageSource:
    """Return `count` images of a source, evenly spread; all if there are no more."""
    if len(source) <= count:
        return source
    images, labels = source.batch(spread_rows(torch.arange(len(source)), count))
    return ImageSet(source.name, source.classes, images, labels, f"{count} of {source.source}")


def run(
    grid_file: Path,
    *,
    out: Path,
    save_dir: Path,
    data_dir: Path | None,
    device: torch.device,
    download: bool = False,
    quick: bool = False,
    only: Collection[str] = (),
    methods: Collection[str] = (),
    split: Scored = "test",
) -> dict[str, Any]:
    """Do the trials of a grid that are not done yet, one row each.

    A trial that raises becomes a row with its error, and is tried again by the next run.

    Args:
        grid_file: the grid's settings.
        out: the rows.
        save_dir: trained parts go to `bench/NAME` below it.
        data_dir: where the image sets lie.
        device: what to compute on.
        download: download image sets into `data_dir`.
        quick: short trainings on few images, 1,000 test images, one grouping, one seed. Where an
            image set cannot be had, a warning says so, and only what needs no training is done.
        only: data sets to do. If it is empty, all of the grid's; in the quick version those of
            which the package has images, if there are any.
        methods: methods to try. One of a user's own (FILE.py:CLASS) that the grid does not name
            is tried where its first block's are. If it is empty, all of the grid's.
        split: what methods are scored on. Rows of another split are others, in another file.

    Returns:
        How many trials the grid has, were done now, were kept, and failed.

    Raises:
        UserError: one line, before any work, if the grid asks for what cannot be done, or `out`
            cannot be written or has rows of something else; before any image set is looked for or
            downloaded, where it does not take the images to tell.
    """
    grid = with_methods(load_grid(grid_file), methods)
    done = newest(read_rows(out, "accuracy"))
    for row in done.values():
        if (other := row["settings"].get("split", "test")) != split:
            raise UserError(f"{out} has rows of the {other} split: name another file (--out)")
    if quick:
        grid = quick_grid(grid)
    folder = save_dir / "bench" / (grid.name + ("-quick" if quick else ""))
    for name in only:
        if name not in grid.datasets:
            known = ", ".join(grid.datasets)
            raise UserError(f"--dataset: {name!r} is not one of {grid_file}'s: {known}")
    if quick and not only:
        only = [name for name in grid.datasets if name in SAMPLES]
    wanted = [trial for trial in trials(grid) if not only or trial.dataset in only]
    asked = [find_method(text).name if is_foreign(text) else text for text in methods]
    for name in asked:
        if name not in (there := dict.fromkeys(trial.method for trial in wanted)):
            raise UserError(f"--method: {name!r} is not one of {grid_file}'s: {', '.join(there)}")
    wanted = [trial for trial in wanted if not asked or trial.method in asked]
    check_parts(grid, wanted, grid_file)
    check_trials(grid, wanted)
    check_writable(out)
    check_folder(save_dir, "--save-dir")
    datasets: dict[str, DataSet] = {}
    for name in dict.fromkeys(trial.dataset for trial in wanted):
        size = load_bundle(grid.datasets[name].bundle).info.provenance.settings.data.image_size
        train, test = _images(name, size, data_dir, download, quick)
        if train is None:
            wanted = [
                trial
                for trial in wanted
                if trial.dataset != name or not needs_training_images(trial)
            ]
        limit = QUICK_TRAINING_IMAGES if quick else None
        datasets[name] = DataSet(
            name, grid.datasets[name], train, test, folder, device, limit, split
        )
    for trial in wanted:
        datasets[trial.dataset].check(trial)
    bench = _Bench(grid, quick)
    jobs = [bench.job(trial, datasets[trial.dataset]) for trial in wanted]
    todo = [job for job in jobs if not study.finished(done.get(job.header["key"]))]
    counts = study.run(todo, out, "accuracy")
    kept = {job.header["key"] for job in jobs} - {job.header["key"] for job in todo}
    replaced = kept - {row["key"] for row in current_accuracy(read_rows(out))}
    if replaced:
        warnings.warn(
            f"{out}: {len(replaced)} of the kept rows are in no table, since newer ones were made "
            "with other settings; another --out keeps them apart",
            stacklevel=2,
        )
    return {"trials": len(jobs), "kept": len(kept), **counts}


def check_trials(grid: AccuracyGrid, wanted: Iterable[Trial]) -> None:
    """Refuse trials that cannot be done, as far as their bundles alone tell.

    What the images have to say, `DataSet.check` asks once they are there: it may take a download.

    Args:
        grid: that the trials are of.
        wanted: the trials.

    Raises:
        UserError: one line.
    """
    bundles: dict[str, Bundle] = {}
    for trial in wanted:
        if trial.bundle not in bundles:
            bundles[trial.bundle] = load_bundle(trial.bundle)
        bundle = bundles[trial.bundle]
        check_possible(trial, bundle.info, None)
        method = find_method(trial.method)
        if method.part:
            settings = getattr(grid.datasets[trial.dataset], method.part)
            method.check_training(settings, bundle.info, trial.k, None)


def _images(
    name: str, size: int | None, data_dir: Path | None, download: bool, quick: bool
) -> tuple[ImageSource | None, ImageSource]:
    """Return training and test images; the quick version goes on with those in the package."""
    load = partial(load_images, name, data_dir=data_dir, download=download, image_size=size)
    try:
        train, test = load("train"), load("test")
    except UserError as error:
        if not quick or name not in SAMPLES:
            raise
        warnings.warn(
            f"{error}; {name}: only what needs no training, on the test images in the package",
            stacklevel=2,
        )
        return None, sample_images(name)
    return train, few_images(test, QUICK_TEST_IMAGES) if quick else test


class _Bench:
    """Does trials and makes rows of them.

    Args:
        grid: for the seed of the groupings.
        quick: noted in the rows.
    """

    def __init__(self, grid: AccuracyGrid, quick: bool) -> None:
        self.grid, self.quick = grid, quick

    def settings(self, trial: Trial, data: DataSet) -> dict[str, Any]:
        """Return everything that a trial's figures depend on."""
        return {
            "groupings": trial.groupings,
            "grouping_seed": self.grid.grouping_seed,
            "patterns": trial.patterns,
            "quick": self.quick,
            **data.depends(trial),
        }

    def job(self, trial: Trial, data: DataSet) -> study.Job:
        """Return a trial as a row to measure."""
        settings = self.settings(trial, data)
        header = {
            "benchmark": "accuracy",
            "key": key_of(trial.as_dict(), settings),
            **trial.as_dict(),
            "settings": settings,
        }
        return study.Job(trial.name(), header, lambda: self.figures(trial, data))

    def figures(self, trial: Trial, data: DataSet) -> dict[str, Any]:
        """Make the method, train what it needs, and score it."""
        began = time.monotonic()
        scheme = data.scheme(trial)
        prepared = time.monotonic()
        systematic = is_systematic(scheme.rules)
        base_logits = partial(data.logits, trial.base, trial.seed, "test", trial.bundle)
        own = None
        if systematic:
            served = scheme.models[scheme.rules.tasks(trial.k)[0].model]
            known = served is data.classifier(trial.base, trial.seed, trial.bundle)
            own = base_logits() if known else task_outputs(scheme, data.test)
        logits = base_logits() if own is None else direct_answers(scheme, own, data.device)
        result = score(
            scheme,
            data.test,
            k=trial.k,
            missing=trial.missing,
            corrupt=trial.corrupt,
            groupings=trial.groupings,
            seed=self.grid.grouping_seed,
            patterns=trial.patterns,
            majority=data.majority(),
            own=own,
        )
        return {
            **describe_score(result),
            "normal": round(float((logits.argmax(1) == data.test.labels).float().mean()), 6),
            "systematic": systematic,
            "r": scheme.rules.r,
            "parameters": scheme.parameters,
            "extra_macs": extra_macs(scheme),
            "served_macs": direct_macs(scheme) if systematic else data.served_macs(trial),
            **({"chosen": dict(scheme.chosen)} if scheme.chosen else {}),
            "preparing_seconds": round(prepared - began, 1),
            "training_seconds": data.training_seconds(trial),
        }


def describe_score(result: Score) -> dict[str, Any]:
    """Return a score for a row: figures rounded to what they can carry."""

    def rounded(value: float | None) -> float | None:
        return None if value is None else round(value, 6)

    return {
        "complete": rounded(result.complete),
        "recovered": rounded(result.recovered),
        "answered": rounded(result.answered),
        "patterns": [[list(lost), round(a, 6)] for lost, a in result.patterns.items()],
        "counts": [list(pair) for pair in result.counts],
    }
