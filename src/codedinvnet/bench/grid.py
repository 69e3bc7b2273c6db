"""The grid of `bench accuracy`: what its settings file says, and the trials it stands for."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator

from codedinvnet.config import (
    PartSettings,
    PixelFusionSettings,
    Positive,
    Section,
    meant,
    validated,
)
from codedinvnet.errors import UserError
from codedinvnet.files import read_json
from codedinvnet.methods import METHODS, NEEDS, REGULARISED, Need
from codedinvnet.methods.parm import check_tiles

Base = Literal["invertible", "resnet"]

GroupSize = Annotated[int, Field(ge=2)]
Count = Annotated[int, Field(ge=0, lt=2**63)]
Patterns = Annotated[int, Field(gt=0, le=1000)]
"""So that what is counted of a group, patterns times members, fits 16 bits."""

PATTERNS = 30
"""Most erasure patterns, unless a grid says otherwise: all of them where one worker is missing."""


class DataSetSettings(Section):
    """One image set: the bundle that serves it, and how the rivals' parts are trained."""

    bundle: str
    """A shipped bundle's name, or a folder."""
    classifier: PartSettings
    """The plain base model."""
    backup: PartSettings
    parity: PartSettings
    """Parity models and learned codes."""
    paper: PixelFusionSettings | None = None
    """The encoder of coded-invnet-paper; for every k of the grid alike, whatever `members` says."""


class Block(Section):
    """A product of choices, each combination a trial."""

    methods: Annotated[tuple[str, ...], Field(min_length=1)]
    datasets: Annotated[tuple[str, ...], Field(min_length=1)] | None = None
    """All of the grid's, if it is missing."""
    bases: Annotated[tuple[Base, ...], Field(min_length=1)] = ("invertible",)
    k: Annotated[tuple[GroupSize, ...], Field(min_length=1)] = (2, 4, 10)
    missing: Annotated[tuple[Count, ...], Field(min_length=1)] = (1,)
    corrupt: Annotated[tuple[Count, ...], Field(min_length=1)] = (0,)
    """Of the workers that do answer, those that send noise."""
    seeds: Annotated[tuple[Count, ...], Field(min_length=1)] = (1,)
    """Of what is trained; a trial in which nothing is uses the first alone."""
    groupings: Positive | None = None
    """Fewer than the grid's, for what is slow."""
    patterns: Patterns | None = None
    """In place of the grid's, where several workers are missing."""
    bundle: str | None = None
    """Of coded-invnet and oracle, in place of the data set's; {dataset} and {k} are the trial's."""
    label: Annotated[str, Field(min_length=1)] | None = None
    """The method's name in the tables; a bundle of its own needs one of its own."""

    @field_validator("bundle")
    @classmethod
    def _can_be_filled_in(cls, bundle: str | None) -> str | None:
        try:
            (bundle or "").format(dataset="", k=2)
        except (LookupError, ValueError, AttributeError, TypeError) as error:
            raise ValueError("braces are for {dataset} and {k} alone") from error
        return bundle


class AccuracyGrid(Section):
    """A settings file of `bench accuracy`."""

    name: Annotated[str, Field(pattern=r"^\w[\w.-]*$")]
    datasets: Annotated[dict[str, DataSetSettings], Field(min_length=1)]
    groupings: Positive = 5
    """Random groupings of the test images; the same for every method at one k."""
    grouping_seed: Count = 0
    patterns: Patterns = PATTERNS
    """Most erasure patterns that are tried; of more, a sample."""
    blocks: Annotated[tuple[Block, ...], Field(min_length=1)]


@dataclass(frozen=True)
class Trial:
    """One row of the results."""

    label: str
    method: str
    dataset: str
    base: Base
    k: int
    missing: int
    corrupt: int
    seed: int
    bundle: str
    groupings: int
    patterns: int = PATTERNS

    def name(self) -> str:
        """Return it in words."""
        return (
            f"{self.label} on {self.dataset} ({self.base}), k = {self.k}, "
            f"{self.missing} missing, "
            + (f"{self.corrupt} corrupt, " if self.corrupt else "")
            + f"seed {self.seed}"
        )

    def as_dict(self) -> dict[str, Any]:
        """Return it for a row, in whose settings the number of patterns stands."""
        return {name: value for name, value in asdict(self).items() if name != "patterns"}


def load_grid(path: Path) -> AccuracyGrid:
    """Read and validate a grid.

    Raises:
        UserError: one line, if it cannot be read, a key or value is wrong, a method or data set
            is unknown, or a label stands for two things.
    """
    raw = read_json(path, "the grid")
    grid = validated(AccuracyGrid, raw, path)
    labels: dict[str, tuple[str, str | None]] = {name: (name, None) for name in METHODS}
    for number, block in enumerate(grid.blocks):
        where = f"{path}: blocks.{number}"
        for field, given, known in (
            ("methods", block.methods, tuple(METHODS)),
            ("datasets", block.datasets or (), tuple(grid.datasets)),
        ):
            for name in given:
                if name not in known:
                    raise UserError(f"{where}.{field}: unknown {name!r}: {meant(name, known)}")
        for name in block.methods:
            if NEEDS[name] in (Need.MODEL, Need.ENCODER) and "resnet" in block.bases:
                raise UserError(f"{where}.bases: {name} needs the invertible base model")
            if NEEDS[name] is not Need.MODEL and block.bundle is not None:
                raise UserError(f"{where}.bundle: {name} runs on the data set's base models")
            if NEEDS[name] is Need.ENCODER:
                for dataset in block.datasets or grid.datasets:
                    if grid.datasets[dataset].paper is None:
                        raise UserError(
                            f"{path}: missing key 'datasets.{dataset}.paper' for {name}"
                        )
            label, means = block.label or name, (name, block.bundle)
            if labels.setdefault(label, means) != means:
                raise UserError(
                    f"{where}.label: {label!r} stands for {_described(*labels[label])} in the "
                    f"tables: name {_described(*means)} otherwise"
                )
    return grid


def _described(method: str, bundle: str | None) -> str:
    """Return in words what a label stands for."""
    return f"{method} of bundle {bundle!r}" if bundle else method


def trained(method: str, base: Base) -> bool:
    """Tell whether a trial depends on weights that the benchmark trains, and so on a seed."""
    return base == "resnet" or NEEDS[method] not in (Need.MODEL, Need.CLASSIFIER)


def needs_training_images(method: str, base: Base) -> bool:
    """Tell whether something is trained for a trial, or chosen on validation images."""
    return trained(method, base) or method in REGULARISED


def trials(grid: AccuracyGrid) -> Iterator[Trial]:
    """Yield the grid's trials, each once, so that those that share weights follow each other."""
    seen: set[Trial] = set()
    for block in grid.blocks:
        datasets = block.datasets or tuple(grid.datasets)
        for dataset, base, method in product(datasets, block.bases, block.methods):
            seeds = block.seeds if trained(method, base) else block.seeds[:1]
            own = grid.datasets[dataset].bundle
            choices = product(seeds, block.k, block.missing, block.corrupt)
            for seed, k, missing, corrupt in choices:
                trial = Trial(
                    label=block.label or method,
                    method=method,
                    dataset=dataset,
                    base=base,
                    k=k,
                    missing=missing,
                    corrupt=corrupt,
                    seed=seed,
                    bundle=block.bundle.format(dataset=dataset, k=k) if block.bundle else own,
                    groupings=min(block.groupings or grid.groupings, grid.groupings),
                    patterns=block.patterns or grid.patterns,
                )
                if trial not in seen:
                    seen.add(trial)
                    yield trial


def check_possible(
    trial: Trial,
    image_shape: tuple[int, int, int],
    images: int | None,
    group_sizes: tuple[int, ...],
) -> None:
    """Refuse a trial that cannot be done.

    Args:
        trial: what is asked for.
        image_shape: (C, H, W).
        images: how many test images there are; None if that is not known yet.
        group_sizes: those that the bundle's encoder serves.

    Raises:
        UserError: one line.
    """
    if images is not None and trial.k > images:
        raise UserError(f"{trial.name()}: there are only {images} test images")
    if trial.method == "parm-concat":
        check_tiles(trial.k, image_shape)
    if trial.method == "coded-invnet" and trial.k not in group_sizes:
        sizes = f"{group_sizes[0]} to {group_sizes[-1]}"
        raise UserError(f"{trial.name()}: bundle {trial.bundle!r} serves groups of {sizes}")
    if trial.missing + trial.corrupt > trial.k - 1:
        raise UserError(f"{trial.name()}: one of the k must be left that is neither")
