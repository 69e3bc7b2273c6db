"""`codedinvnet bench accuracy`: every method on every data set, one resumable grid."""

from __future__ import annotations

import time
import warnings
from collections.abc import Collection, Iterable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from pandas import Series

from codedinvnet.codes.base import Scheme
from codedinvnet.codes.equal_cost import direct_macs, extra_macs
from codedinvnet.codes.erase import NO_ANSWER, direct_answers, erase, task_outputs
from codedinvnet.codes.patterns import erasure_patterns
from codedinvnet.codes.registry import find_method
from codedinvnet.codes.rules import is_systematic
from codedinvnet.common.config import PixelFusionSettings
from codedinvnet.common.errors import UserError
from codedinvnet.common.files import check_folder, check_writable
from codedinvnet.common.grid import Cell, read_rows, resume, select
from codedinvnet.data import (
    SAMPLES,
    ImageRows,
    ImageSource,
    load_images,
    sample_images,
    spread_rows,
)
from codedinvnet.evaluation.parts import DataSet, Scored
from codedinvnet.evaluation.trials import (
    AccuracyGrid,
    Trial,
    check_part,
    check_possible,
    is_foreign,
    load_grid,
    trials,
    with_methods,
)
from codedinvnet.models.bundle import load_bundle
from codedinvnet.training.images import check_pixels

QUICK_TEST_IMAGES = 1000
QUICK_TRAINING_IMAGES = 2000
QUICK_STEPS = 10
"""Training steps of each part in the quick version."""


def quick_grid(grid: AccuracyGrid) -> AccuracyGrid:
    """Return a grid of the same trials that takes minutes: short trainings, one seed."""

    def shorter(budget: Any) -> Any:
        return budget.quick(QUICK_STEPS) if hasattr(budget, "quick") else budget

    datasets = {}
    for name, settings in grid.datasets.items():
        changes = {part: shorter(budget) for part, budget in settings.budgets.items()}
        changes["classifier"] = shorter(settings.classifier)
        datasets[name] = settings.model_copy(update=changes)
    blocks = tuple(block.model_copy(update={"seeds": block.seeds[:1]}) for block in grid.blocks)
    return grid.model_copy(update={"datasets": datasets, "blocks": blocks, "groupings": 1})


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
    missing: int | None = None,
    split: Scored = "test",
) -> dict[str, Any]:
    """Do the trials of a grid that have no row yet, and return how many were done, kept and failed.

    Args:
        grid_file: the grid's settings.
        out: the rows.
        save_dir: trained parts go to `bench/NAME` below it.
        data_dir: where the image sets lie.
        device: what to compute on.
        download: download image sets into `data_dir`.
        quick: short trainings on few images, 1,000 test images, one grouping, one seed. Where an
            image set cannot be had, a warning says so, and only what needs no training is done.
        only: words `KEY=VALUE` that trials must fit, such as `dataset=mnist` and `k=10`. If none
            names a data set, the quick version does those of which the package has images.
        methods: methods to try; all of the grid's if it is empty. A method of a user's own
            (FILE.py:CLASS) that the grid does not name is tried where its first block's are.
        missing: only trials with so many missing workers; None: those of the grid, and one for a
            method of a user's own.
        split: the images that methods are scored on.
    """
    grid = load_grid(grid_file, filter(is_foreign, methods))
    grid = with_methods(grid, methods, 1 if missing is None else missing)
    only = [*only, *([] if missing is None else [f"missing={missing}"])]
    if any(row["settings"].get("split", "test") != split for row in read_rows(out, "accuracy")):
        raise UserError(f"{out} has rows of another split: name another file (--out)")
    if quick:
        grid = quick_grid(grid)
    wanted = select(list(trials(grid)), only, lambda trial: trial.place)
    if quick and not any(word.startswith("dataset=") for word in only):
        wanted = [t for t in wanted if t.dataset in SAMPLES] or wanted
    names = [find_method(text).name if is_foreign(text) else text for text in methods]
    there = dict.fromkeys(trial.method for trial in wanted)
    for name in names:
        if name not in there:
            raise UserError(f"--method: {name!r} is not one of {grid_file}'s: {', '.join(there)}")
    wanted = [trial for trial in wanted if not names or trial.method in names]
    check_trials(grid, wanted, grid_file)
    check_writable(out)
    check_folder(save_dir, "--save-dir")
    folder = save_dir / "bench" / (grid.name + ("-quick" if quick else ""))
    datasets: dict[str, DataSet] = {}
    for name in dict.fromkeys(trial.dataset for trial in wanted):
        train, test = _images(name, data_dir, download, quick)
        if train is None:
            wanted = [
                t
                for t in wanted
                if t.dataset != name or not (t.trained or find_method(t.method).tuned)
            ]
        limit = QUICK_TRAINING_IMAGES if quick else None
        datasets[name] = DataSet(
            name, grid.datasets[name], train, test, folder, device, limit, split
        )
    for trial in wanted:
        datasets[trial.dataset].check(trial)
    cells = [cell(trial, datasets[trial.dataset], grid.grouping_seed, quick) for trial in wanted]
    return {"trials": len(cells), **resume(cells, out)}


def check_trials(grid: AccuracyGrid, wanted: Iterable[Trial], path: Path) -> None:
    """Refuse trials that cannot be done, as far as their settings and bundles tell.

    `DataSet.check` asks again once the images are there, which may take a download.
    """
    for trial in wanted:
        method, bundle = find_method(trial.method), load_bundle(trial.bundle).info
        check_part(grid, method, trial.dataset, path, trial.base)
        check_possible(trial, bundle, None)
        budget = grid.datasets[trial.dataset].budget(method.part)
        if isinstance(budget, PixelFusionSettings):
            check_pixels(budget, min(bundle.input.shape[1:]) + 2 * bundle.input.padding)


def _images(
    name: str, data_dir: Path | None, download: bool, quick: bool
) -> tuple[ImageSource | None, ImageSource]:
    """Return training and test images; the quick version makes do with those in the package."""
    load = partial(load_images, name, data_dir=data_dir, download=download)
    try:
        train, test = load("train"), load("test")
    except UserError as error:
        if not quick or name not in SAMPLES or not (data_dir is None or data_dir.is_dir()):
            raise
        warnings.warn(
            f"{error}; {name}: only what needs no training, on the test images in the package",
            stacklevel=2,
        )
        return None, sample_images(name)
    if quick:
        rows = spread_rows(torch.arange(len(test)), QUICK_TEST_IMAGES)
        test = ImageRows(test, rows, f"{len(rows)} of {test.source}")
    return train, test


def cell(trial: Trial, data: DataSet, grouping_seed: int, quick: bool) -> Cell:
    """Return a trial as a cell of the grid."""
    settings = {
        "groupings": trial.groupings,
        "grouping_seed": grouping_seed,
        "patterns": trial.patterns,
        "quick": quick,
        **data.depends(trial),
    }
    measure = partial(figures, trial, data, grouping_seed)
    return Cell("accuracy", trial.place, settings, measure, trial.name())


def figures(trial: Trial, data: DataSet, grouping_seed: int) -> dict[str, Any]:
    """Make a trial's method, train what it needs, and score it."""
    began = time.monotonic()
    scheme = data.scheme(trial)
    prepared = time.monotonic()
    systematic = is_systematic(scheme.rules)
    own, logits = None, data.logits(trial.base, trial.seed, "test")
    if systematic:
        served = scheme.models[scheme.rules.tasks(trial.k)[0].model]
        known = served is data.classifier(trial.base, trial.seed)
        own = logits if known else task_outputs(scheme, data.test)
        logits = direct_answers(scheme, own, data.device)
    return {
        **score(scheme, data, trial, grouping_seed, own),
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


def score(
    scheme: Scheme, data: DataSet, trial: Trial, seed: int, own: torch.Tensor | None = None
) -> dict[str, Any]:
    """Erase workers in every pattern, and return what that does to the answers.

    Returns:
        `recovered`, the accuracy of the answers that erasures concern (of a systematic code the
        erased members', of another everybody's); `answered`, the share of these answers that there
        were, the others counting as the majority class; `complete`, the accuracy without erasures
        of a code that decodes even then; `patterns` with their accuracies; and `counts` of right
        and of all answers by grouping.
    """
    tasks = sorted(scheme.rules.tasks(trial.k))
    sets = erasure_patterns(trial.k, len(tasks) - trial.k, trial.missing, trial.patterns, seed)
    patterns = [tuple(tasks[i] for i in lost) for lost in sets]
    whole = not is_systematic(scheme.rules) and () not in patterns
    frame = erase(
        scheme,
        data.test,
        [*patterns, *([()] if whole else [])],
        k=trial.k,
        groupings=trial.groupings,
        seed=seed,
        own=own,
    )
    erased = frame["lost"].map(len).astype(int) == trial.missing
    complete, frame = frame[~erased], frame[erased]
    answered = frame["prediction"] != NO_ANSWER
    right = frame["prediction"].where(answered, data.majority) == frame["label"]
    counts = right.groupby(frame["grouping"]).agg(["sum", "count"])
    by_pattern = right.groupby(frame["lost"], observed=True).mean()

    def share(values: Series) -> float | None:
        return round(float(values.mean()), 6) if len(values) else None

    return {
        "complete": share(complete["prediction"] == complete["label"]),
        "recovered": share(right),
        "answered": share(answered),
        "patterns": [[list(lost), round(float(a), 6)] for lost, a in by_pattern.items()],
        "counts": [[int(a), int(b)] for a, b in counts.to_numpy()],
    }
