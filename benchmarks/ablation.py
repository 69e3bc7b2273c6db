"""`python -m benchmarks ablation`: what each part of the design is worth, one change at a time.

A grid file names a base of settings, image sets, seeds and rows; a row is a change to the base, and
is compared with the row from which it differs in one thing. Networks that rows share are trained
once. Every trial is one line of the output, written when it ends, so that an interrupted grid goes
on where it stopped. The validation split is read as trials end, the test split once, after the
last of them.
"""

from __future__ import annotations

import hashlib
import json
import statistics
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
from pydantic import Field, field_validator
from tqdm import tqdm

from codedinvnet import stages
from codedinvnet.bench.accuracy import few_images
from codedinvnet.bench.tables import one_line
from codedinvnet.config import (
    PixelFusionSettings,
    Section,
    Settings,
    parse_settings,
    validated,
)
from codedinvnet.data import Split, load_images
from codedinvnet.errors import UserError
from codedinvnet.evaluation.accuracy import evaluation_report
from codedinvnet.files import check_folder, check_writable, parse_json, read_json, write_text
from codedinvnet.models.bundle import DESCRIPTION, WEIGHTS, Bundle, load_bundle
from codedinvnet.provenance import describe_commit, describe_machine
from codedinvnet.training import pixels
from codedinvnet.training.loop import LATEST
from codedinvnet.training.network import NETWORK, network_settings

SCHEMA = 1
QUICK_IMAGES: dict[Split, int] = {"train": 6000, "test": 1000}
QUICK_VALIDATION = 1000
QUICK_EPOCHS, QUICK_STEPS = 2, 10
QUICK_GROUPS = 480
"""Of the paper's objective."""

TRAINING = {"mosaic": 2, "pixels": pixels.VERSION}
"""Versions of the training code: of f and g ("network"), of an objective, of a kind of encoder. One
that is not here is 1.

Raise one with a change that no setting tells of, such as how a step draws its groups: results of
the old code are then not taken for those of the new. A mosaic's grids are trained equally often
since 2.
"""


class AblationRow(Section):
    """A change to the base."""

    name: str
    change: dict[str, Any]
    against: str | None = None
    """The name of the earlier row that it changes one thing of; null: the first."""
    note: str = ""
    """What the table says behind the name. Unlike that, it may change when trials are done."""


class Grid(Section):
    """A grid file."""

    base: dict[str, Any]
    """Settings without name, seed and data."""
    data: Annotated[dict[str, dict[str, Any]], Field(min_length=1)]
    """Image set -> what it changes in the base, its `data` section at least."""
    seeds: Annotated[tuple[int, ...], Field(min_length=1)]
    rows: Annotated[tuple[AblationRow, ...], Field(min_length=1)]
    """The first is the design."""
    k: Annotated[tuple[Annotated[int, Field(ge=2)], ...], Field(min_length=1)] = (10,)
    """Group sizes to score. The paper's objective trains an encoder for each."""

    @field_validator("rows")
    @classmethod
    def _each_has_a_name_and_an_earlier_row(
        cls, rows: tuple[AblationRow, ...]
    ) -> tuple[AblationRow, ...]:
        earlier: list[str] = []
        for row in rows:
            if row.name in earlier:
                raise ValueError(f"two rows have the name {row.name!r}")
            if row.against not in (None, *earlier):
                raise ValueError(f"{row.name!r} is against {row.against!r}, no earlier row's name")
            earlier.append(row.name)
        return rows


class Trial(Section):
    """One row, image set and seed, and the group sizes that one training is scored at."""

    row: str
    data: str
    sizes: tuple[int, ...]
    settings: Settings
    """Their name is not looked at."""
    against: str
    """The row to compare it with; its own, if it is the first."""
    note: str
    quick: bool = False

    @property
    def key(self) -> str:
        """What tells it from all others, its settings included, wherever in the grid it stands."""
        fusion = self.settings.fusion
        words = _words(("network", fusion.objective, fusion.encoder.kind), self.quick)
        return _key(self.row, self.data, self.sizes, self.settings, words)

    @property
    def folder(self) -> str:
        """The name of a folder of its own: no other trial resumes its checkpoints."""
        return f"{self.data}-{_digest(self.key)}"

    @property
    def network_name(self) -> str:
        """The name of the network that it shares with all trials that train the same one."""
        shared = [network_settings(self.settings), *_words(("network",), self.quick)]
        return f"{self.data}-{_digest(json.dumps(shared, sort_keys=True))}"

    @property
    def members(self) -> int:
        """The largest size."""
        return max(self.sizes)


def _key(
    row: str, data: str, sizes: Sequence[int], settings: Settings, words: Sequence[Any]
) -> str:
    """Return a trial's key. All options are in it, or one whose default changes would not show."""
    options = settings.model_dump(mode="json", exclude={"name"})
    return json.dumps([row, data, sizes, options, *words])


def _words(parts: Iterable[str], quick: bool) -> list[Any]:
    """Return what a key says beside the settings: versions of the training other than 1; quick."""
    versions = [[part, TRAINING[part]] for part in parts if part in TRAINING]
    return [*versions, *(["quick"] if quick else [])]


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def load_grid(path: Path) -> Grid:
    """Read a grid file.

    Raises:
        UserError: if it cannot be read or is wrong, with the place of the fault.
    """
    raw = read_json(path, "the grid")
    return validated(Grid, raw, path)


def merge(base: Mapping[str, Any], change: Mapping[str, Any]) -> dict[str, Any]:
    """Return base with the changes of nested keys; a section of another objective replaces it."""
    merged = dict(base)
    for key, value in change.items():
        old = merged.get(key)
        if isinstance(old, Mapping) and isinstance(value, Mapping):
            other = value.get("objective", old.get("objective")) != old.get("objective")
            merged[key] = value if other else merge(old, value)
        else:
            merged[key] = value
    return merged


def hastened(settings: Settings) -> Settings:
    """Return settings that train for seconds, for `--quick`."""
    fusion, data = settings.fusion, settings.data
    shorter: dict[str, int]
    if isinstance(fusion, PixelFusionSettings):
        shorter = {"groups": min(fusion.groups, QUICK_GROUPS)}
    else:
        shorter = {
            "steps_per_epoch": min(fusion.steps_per_epoch, QUICK_STEPS),
            "joint_epochs": min(fusion.joint_epochs, QUICK_EPOCHS),
        }
    shorter["epochs"] = min(fusion.epochs, QUICK_EPOCHS)
    validation = min(data.validation, QUICK_VALIDATION)
    changed = {
        "data": data.model_copy(update={"validation": validation}),
        "fusion": fusion.model_copy(update=shorter),
    }
    return settings.model_copy(update=changed)


def write_few_images(sizes: Mapping[str, int | None], data_dir: Path | None, folder: Path) -> None:
    """Write a few images of image sets to a folder, as `load_images` finds them there.

    Args:
        sizes: image set -> `image_size` of `load_images`.
        data_dir: where the image sets lie.
        folder: where the few images go.

    Raises:
        UserError: if a set is not there.
    """
    for name, size in sizes.items():
        for split, count in QUICK_IMAGES.items():
            found = load_images(name, split, data_dir=data_dir, image_size=size)
            source = few_images(found, count)
            images, labels = source.batch(torch.arange(len(source)))
            (folder / name).mkdir(parents=True, exist_ok=True)
            np.savez(
                folder / name / f"{split}.npz",
                images=images.permute(0, 2, 3, 1).numpy(),
                labels=labels.numpy(),
                classes=np.array(source.classes),
            )


def trials(grid: Grid, path: Path, quick: bool = False) -> list[Trial]:
    """Return every trial of a grid, all settings checked, before any work is done.

    The quick version has the first image set and the first seed alone, and short trainings.

    Raises:
        UserError: if a row's settings are wrong.
    """
    found = []
    most = 1 if quick else None
    for data, change in list(grid.data.items())[:most]:
        for seed in grid.seeds[:most]:
            for row in grid.rows:
                raw = merge(merge(grid.base, change), row.change)
                raw |= {"name": data, "seed": seed}
                if isinstance(raw.get("fusion"), dict):  # what else it is, the settings refuse
                    raw["fusion"] = {**raw["fusion"], "members": max(grid.k)}
                settings = parse_settings(raw, f"{path}, row {row.name!r}")
                settings = hastened(settings) if quick else settings
                pixels = isinstance(settings.fusion, PixelFusionSettings)
                for sizes in [(k,) for k in grid.k] if pixels else [grid.k]:
                    found.append(
                        Trial(
                            row=row.name,
                            data=data,
                            sizes=sizes,
                            settings=settings,
                            against=row.against or grid.rows[0].name,
                            note=row.note,
                            quick=quick,
                        )
                    )
    return found


def read_results(path: Path) -> list[dict[str, Any]]:
    """Read the trials of the grid that was run last; none if the file is not there.

    Raises:
        UserError: if a line is damaged, or not of this benchmark.
    """
    return [row for row in read_everything(path) if not row.get("set_aside")]


def read_everything(path: Path) -> list[dict[str, Any]]:
    """Read all trials, those of other grids, too; none if the file is not there.

    Raises:
        UserError: if a line is damaged, or not of this benchmark.
    """
    if not path.is_file():
        return []
    rows = []
    for number, line in enumerate(path.read_bytes().splitlines(), start=1):
        row = parse_json(line, f"{path}, line {number}")
        if not _is_own(row):
            raise UserError(
                f"{path}, line {number} is not of `benchmarks ablation`: name another file"
            )
        # Rows of a release that did not write its folder's name: it is that of the key it knew.
        folder = row.get("folder", f"{row['data']}-{_digest(row['key'])}")
        rows.append({**row, "key": _respelt(row["key"]), "folder": folder})
    return rows


def _is_own(row: Any) -> bool:
    """Tell whether a line's value is a trial of this benchmark, by what its key says of it."""
    try:
        name, data, sizes, settings, *_ = json.loads(row["key"])
        named = [row["schema_version"], row["row"], row["data"], row["k"], type(row["seed"])]
        return isinstance(settings, dict) and named == [SCHEMA, name, data, sizes, int]
    except (TypeError, KeyError, ValueError):
        return False


def _respelt(key: str) -> str:
    """Return a key as this release writes it: with the options that came since, at their defaults.

    A key with options that are no more stays as it is.
    """
    row, data, sizes, options, *words = json.loads(key)
    try:
        settings = parse_settings({**options, "name": "any"}, row)
    except UserError:
        return key
    return _key(row, data, sizes, settings, words)


def run(
    path: Path,
    out: Path,
    *,
    save_dir: Path,
    data_dir: Path | None,
    device: torch.device,
    test: bool = True,
    quick: bool = False,
) -> list[dict[str, Any]]:
    """Run what is missing of a grid, and read the test split once all trials have ended.

    Args:
        path: the grid file.
        out: JSONL, one trial a line; finished trials in it are kept, those of other grids behind
            this one's and marked (`set_aside`).
        save_dir: where runs and shared networks lie.
        data_dir: where the image sets lie.
        device: what to compute on.
        test: whether to read the test split in the end.
        quick: one image set, one seed, short trainings on 5,000 images, 1,000 test images.

    Raises:
        UserError: before any trial, if the grid is wrong, if `out` cannot be written or holds what
            is not of this benchmark, or if images are missing.
    """
    grid = load_grid(path)
    wanted = {trial.key: trial for trial in trials(grid, path, quick)}
    check_writable(out)
    check_folder(save_dir, "--save-dir")
    done: dict[str, dict[str, Any]] = {}
    for row in read_everything(out):
        if "error" in done.get(row["key"], {"error": ""}):
            done[row["key"]] = row
    if quick:
        images = save_dir / "images"
        write_few_images(_image_sets(wanted.values()), data_dir, images)
        data_dir = images
    else:
        needed = {"validation", "test"} if test else {"validation"}
        todo = [trial for key, trial in wanted.items() if needed - done.get(key, {}).keys()]
        for name, size in _image_sets(todo).items():
            for split in QUICK_IMAGES:  # that they are there is known before any trial is begun
                load_images(name, split, data_dir=data_dir, image_size=size)
    if done:
        _write(out, wanted, done)
    places = _Places(save_dir, data_dir, device)
    for key, trial in tqdm(wanted.items(), desc="ablation", unit="trial", dynamic_ncols=True):
        known = done.get(key, {"error": ""})
        if "error" in known or (test and _has_lost_bundle(trial, known, places)):
            done[key] = _trained(trial, places)
            _write(out, wanted, done)
    if test:
        for key, trial in tqdm(wanted.items(), desc="test split", unit="trial"):
            if "error" not in done[key] and "test" not in done[key]:
                done[key]["test"] = _scored(trial, places.run(trial, done[key]["folder"]), "test")
                _write(out, wanted, done)
    return [done[key] for key in wanted]


def _image_sets(found: Iterable[Trial]) -> dict[str, int | None]:
    """Return the image sets that trials need, each with its `image_size`."""
    return {trial.settings.data.name: trial.settings.data.image_size for trial in found}


def _write(out: Path, wanted: Mapping[str, Trial], done: Mapping[str, dict[str, Any]]) -> None:
    """Write the wanted trials that are done, and behind them those of other grids, marked.

    How a row is shown is as the grid has it now.
    """
    for key, row in done.items():
        row.pop("set_aside", None)
        if key in wanted:
            row |= wanted[key].model_dump(include={"against", "note"})
        else:
            row["set_aside"] = True
    keys = [*(key for key in wanted if key in done), *(key for key in done if key not in wanted)]
    write_text(out, "".join(json.dumps(done[key]) + "\n" for key in keys))


@dataclass(frozen=True)
class _Places:
    """Where runs and image sets lie, and what to compute on."""

    save_dir: Path
    data_dir: Path | None
    device: torch.device

    def run(self, trial: Trial, folder: str) -> stages.Run:
        """Return the trial's run in a folder; its network is shared by all with the same one."""
        return stages.Run(
            settings=trial.settings.model_copy(update={"name": folder}),
            save_dir=self.save_dir,
            data_dir=self.data_dir,
            device=self.device,
            resume=LATEST,
            shared_network=self.save_dir / "networks" / trial.network_name,
        )


def _bundle(trial: Trial, run: stages.Run) -> Path:
    return run.fusion_folder(trial.members) / "bundle"


def _has_lost_bundle(trial: Trial, row: Mapping[str, Any], places: _Places) -> bool:
    """Tell whether a trial's test split is still to be read, and what it trained is gone."""
    bundle = _bundle(trial, places.run(trial, row["folder"]))
    there = all((bundle / name).is_file() for name in (DESCRIPTION, WEIGHTS))
    return "test" not in row and not there


def _trained(trial: Trial, places: _Places) -> dict[str, Any]:
    """Train a trial and score it on the validation split."""
    row: dict[str, Any] = {
        "schema_version": SCHEMA,
        "key": trial.key,
        "row": trial.row,
        "data": trial.data,
        "seed": trial.settings.seed,
        "k": list(trial.sizes),
        "quick": trial.quick,
        "folder": trial.folder,
        "commit": describe_commit(),
        "machine": describe_machine(),
        "time": time.strftime("%Y-%m-%dT%H:%M:%S"),
    }
    run = places.run(trial, trial.folder)
    try:
        if not (run.network_folder / NETWORK).is_file():
            stages.train(run)
        if isinstance(trial.settings.fusion, PixelFusionSettings):
            stages.sample(run, trial.members)
        stages.fuse(run, trial.members)
        row["validation"] = _scored(trial, run, "validation")
    except (UserError, RuntimeError) as error:  # a row with its error, not a hole
        row["error"] = f"{type(error).__name__}: {error}"
    return row


def _scored(trial: Trial, run: stages.Run, split: str) -> dict[str, Any]:
    """Return what was measured, by group size."""
    bundle = load_bundle(_bundle(trial, run), run.device)
    source = stages.evaluation_images(bundle, split, run.data_dir)
    kept = ("normal_accuracy", "recovered_accuracy", "recovered_accuracy_std")
    scores: dict[str, Any] = {"seconds": _seconds(run.fusion_folder(trial.members), bundle)}
    for k in trial.sizes:
        report = evaluation_report(bundle, source, split=split, k=k, progress=False)
        scores[str(k)] = {key: report[key] for key in kept}
    return scores


def _seconds(folder: Path, bundle: Bundle) -> float:
    """Return what all stages took: f and g, though rows share them, sampling, and the fusion."""
    return round(bundle.info.provenance.seconds + stages.sampling_seconds(folder), 1)


def table(results: Sequence[Mapping[str, Any]]) -> str:
    """Return the rows as Markdown: mean and spread over seeds, also of the margin to another row.

    If one of the two failed, there is no margin.
    """
    lines = []
    split = "test" if all("test" in row for row in results if "error" not in row) else "validation"
    sizes = sorted({k for row in results for k in row["k"]})
    for data in dict.fromkeys(row["data"] for row in results):
        for k in sizes:
            own = [row for row in results if row["data"] == data and k in row["k"]]
            lines += _table(own, f"{data}, {split} split, k = {k}", split, str(k))
    return "\n".join(lines)


def _table(own: Sequence[Mapping[str, Any]], title: str, split: str, k: str) -> list[str]:
    lines = [
        f"| row | {title} | normal | recovered | margin | to row | seconds of all stages |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    names = list(dict.fromkeys(row["row"] for row in own))
    numbers = {name: number for number, name in enumerate(names, start=1)}
    found: dict[str, dict[int, float]] = {}  # recovered accuracies in %, by row and seed
    for name, number in numbers.items():
        these = [row for row in own if row["row"] == name]
        note = these[0].get("note")
        shown = f"| {number} | {name} ({note})" if note else f"| {number} | {name}"
        failed = [row["error"] for row in these if "error" in row]
        if failed:
            lines.append(f"{shown} | | | failed: {one_line(failed[0])} | | |")
            continue
        recovered = {row["seed"]: 100 * row[split][k]["recovered_accuracy"] for row in these}
        normal = [100 * row[split][k]["normal_accuracy"] for row in these]
        seconds = statistics.mean(row[split]["seconds"] for row in these)
        against = these[0].get("against", names[0])  # it is not in older rows
        reference = found.get(against, {})
        margins = [v - reference[seed] for seed, v in recovered.items() if seed in reference]
        margin = f"{_spread(margins, '+')} | {numbers[against]}" if margins else " | "
        found[name] = recovered
        lines.append(
            f"{shown} | {_spread(normal)} | {_spread(list(recovered.values()))} | {margin} | "
            f"{seconds:.0f} |"
        )
    return [*lines, ""]


def _spread(values: Sequence[float], sign: str = "") -> str:
    """Return mean ± standard deviation; one value alone has none."""
    mean = f"{statistics.mean(values):{sign}.2f}"
    return f"{mean} ± {statistics.stdev(values):.2f}" if len(values) > 1 else mean
