"""`python -m benchmarks ablation`: what each part of the design is worth, one change at a time.

A grid file names a base of settings, image sets, seeds and rows; a row is a change to the base, and
is compared with the row from which it differs in one thing. Networks that rows share are trained
once.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Any

from pandas import DataFrame
from pydantic import Field, field_validator

from codedinvnet import stages
from codedinvnet.config import (
    PixelFusionSettings,
    Section,
    Settings,
    parse_settings,
    validated,
)
from codedinvnet.data import Split, load_images
from codedinvnet.devices import denormals_flushed
from codedinvnet.evaluation import tables
from codedinvnet.evaluation.accuracy import evaluation_report
from codedinvnet.evaluation.grid import Cell, Row, failures, key_of, latest, read_rows, resume
from codedinvnet.evaluation.quantiles import clustered_ci
from codedinvnet.files import check_folder, check_writable, read_json
from codedinvnet.models.bundle import load_bundle
from codedinvnet.training import pixels
from codedinvnet.training.loop import LATEST
from codedinvnet.training.network import NETWORK, network_settings

SPLITS: tuple[Split, ...] = ("train", "test")
TRAINING = {"mosaic": 2, "pixels": pixels.OBJECTIVE_VERSION}
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

    @property
    def place(self) -> dict[str, Any]:
        """Its coordinates in the grid."""
        sizes = ", ".join(map(str, self.sizes))
        return {"row": self.row, "data": self.data, "seed": self.settings.seed, "sizes": sizes}

    @property
    def depends(self) -> dict[str, Any]:
        """What else its figures depend on: options that are not the default, and versions."""
        fusion = self.settings.fusion
        words = self._words("network", fusion.objective, fusion.encoder.kind)
        options = self.settings.model_dump(
            mode="json", exclude={"name", "seed"}, exclude_defaults=True
        )
        return {"options": options, "training": words}

    @property
    def network_name(self) -> str:
        """The name of the network that it shares with all trials that train the same one."""
        shared = key_of(network_settings(self.settings), self._words("network"))
        return f"{self.data}-{shared}"

    def _words(self, *parts: str) -> list[Any]:
        """Return versions of the training other than 1."""
        return [[part, TRAINING[part]] for part in parts if part in TRAINING]


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


def trials(grid: Grid, path: Path) -> list[Trial]:
    """Return every trial of a grid, all settings checked, before any work is done.

    Raises:
        UserError: if a row's settings are wrong.
    """
    found = []
    for data, change in grid.data.items():
        for seed in grid.seeds:
            for row in grid.rows:
                raw = merge(merge(grid.base, change), row.change)
                raw |= {"name": data, "seed": seed}
                if isinstance(raw.get("fusion"), dict):  # what else it is, the settings refuse
                    raw["fusion"] = {**raw["fusion"], "members": max(grid.k)}
                settings = parse_settings(raw, f"{path}, row {row.name!r}")
                pixels = isinstance(settings.fusion, PixelFusionSettings)
                for sizes in [(k,) for k in grid.k] if pixels else [grid.k]:
                    found.append(Trial(row=row.name, data=data, sizes=sizes, settings=settings))
    return found


@denormals_flushed()
def run(
    grid: Path,
    out: Path | None = None,
    *,
    save_dir: Path | None = None,
    data_dir: Path | None = None,
    device: str = "cpu",
    no_test: bool = False,
) -> dict[str, Any]:
    """Run what is missing of a grid, and return the rows of all of it, with their table.

    Args:
        grid: the grid file.
        out: JSONL, one trial a line; finished trials in it are kept. None: in `runs`.
        save_dir: where runs and shared networks lie; None: in `runs`.
        data_dir: where the image sets lie.
        device: what to compute on.
        no_test: leave the test split unread; choices can still be made.

    Raises:
        UserError: before any trial, if the grid is wrong, if `out` cannot be written or holds what
            are no rows, or if images are missing.
    """
    kept = Path("runs") / "ablation"
    out, save_dir = out or kept.with_suffix(".jsonl"), save_dir or kept
    read = load_grid(grid)
    wanted = trials(read, grid)
    check_writable(out)
    check_folder(save_dir, "--save-dir")
    for name, size in {t.settings.data.name: t.settings.data.image_size for t in wanted}.items():
        for split in SPLITS:  # that they are there is known before any trial is begun
            load_images(name, split, data_dir=data_dir, image_size=size)
    splits = ("validation",) if no_test else ("validation", "test")
    cells = []
    for trial in wanted:
        key = key_of(trial.place, trial.depends)
        run = stages.Run(
            settings=trial.settings.model_copy(update={"name": f"{trial.data}-{key}"}),
            save_dir=save_dir,
            data_dir=data_dir,
            device=stages.choose_device(device),
            resume=LATEST,
            shared_network=save_dir / "networks" / trial.network_name,
        )
        name = f"{trial.row}, {trial.data}, seed {trial.settings.seed}"
        settings = {**trial.depends, **({"splits": splits} if no_test else {})}
        cells.append(
            Cell("ablation", trial.place, settings, partial(_measured, trial, run, splits), name)
        )
    resume(cells, out)
    keys = {cell.key for cell in cells}
    rows = [row for row in read_rows(out, "ablation") if row["key"] in keys]
    return {"rows": rows, "table": table(rows, read)}


def _measured(trial: Trial, run: stages.Run, splits: Iterable[str]) -> dict[str, Any]:
    """Train a trial, and score it on the splits, by group size."""
    largest = max(trial.sizes)
    if not (run.network_folder / NETWORK).is_file():
        stages.train(run)
    if isinstance(trial.settings.fusion, PixelFusionSettings):
        stages.sample(run, largest)
    stages.fuse(run, largest)
    folder = run.fusion_folder(largest)
    bundle = load_bundle(folder / "bundle", run.device)
    # What all stages took: f and g, though rows share them, sampling, and the fusion.
    seconds = round(bundle.info.provenance.seconds + stages.sampling_seconds(folder), 1)
    found: dict[str, Any] = {}
    for split in splits:
        source = stages.evaluation_images(bundle, split, run.data_dir)
        found[split] = {"seconds": seconds}
        for k in trial.sizes:
            report = evaluation_report(bundle, source, split=split, k=k, progress=False)
            kept = ("normal_accuracy", "recovered_accuracy")
            found[split][str(k)] = {key: report[key] for key in kept}
    return found


PLACE = ["row", "data", "seed", "sizes"]


def table(rows: Iterable[Row], grid: Grid) -> str:
    """Return the rows of a grid as Markdown.

    `margin` is to the row that a row is against, mean over the seeds.
    """
    rows = list(rows)
    numbers = {row.name: number for number, row in enumerate(grid.rows, start=1)}
    frame = latest(rows, PLACE, repeated=["seed"])
    failed = failures(rows, PLACE)
    split = "test" if "test" in frame and frame["test"].notna().all() else "validation"
    scores = DataFrame(
        [
            {
                **{name: line[name] for name in ("row", "data", "seed")},
                **{"k": int(k), "seconds": line[split]["seconds"]},
                **{n: 100 * line[split][k][f"{n}_accuracy"] for n in ("normal", "recovered")},
            }
            for line in frame.to_dict("records")
            for k in line["sizes"].split(", ")
        ],
        columns=["row", "data", "seed", "k", "seconds", "normal", "recovered"],
    )
    lines = []
    places = dict.fromkeys((row["data"], int(k)) for row in rows for k in row["sizes"].split(", "))
    for data, k in places:
        here = scores[(scores["data"] == data) & (scores["k"] == k)]
        recovered = here.set_index(["row", "seed"])["recovered"]
        for change in grid.rows:
            own = here[here["row"] == change.name]
            shown = f"{change.name} ({change.note})" if change.note else change.name
            line = {"data": data, "k": k, "": numbers[change.name], f"row ({split} split)": shown}
            errors = failed[(failed["row"] == change.name) & (failed["data"] == data)]["error"]
            if len(errors):
                lines.append({**line, "recovered": f"failed: {errors.iloc[0]}"})
            elif len(own):
                against = change.against or grid.rows[0].name
                base = recovered.get(against) if against != change.name else None
                margins = [] if base is None else (recovered[change.name] - base).dropna()
                lines.append(
                    {
                        **line,
                        "normal": _mean(own["normal"]),
                        "recovered": _mean(own["recovered"]),
                        "margin": _mean(margins, "+") if len(margins) else None,
                        "to row": str(numbers[against]) if len(margins) else None,
                        "seconds": f"{own['seconds'].mean():.0f}",
                    }
                )
    return tables.markdown(DataFrame(lines))


def _mean(values: Sequence[float], sign: str = "") -> str:
    """Return mean ± half of the 95 % interval over seeds, if there is one."""
    half = clustered_ci(list(values))
    mean = f"{sum(values) / len(values):{sign}.2f}"
    return mean if half is None else f"{mean} ± {half:.2f}"
