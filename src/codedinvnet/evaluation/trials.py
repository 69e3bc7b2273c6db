"""The grid of `bench accuracy`: its settings file, and the trials that it stands for."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field

from codedinvnet.codes.method import Method
from codedinvnet.codes.registry import METHODS, UnknownMethod, find_method
from codedinvnet.common.config import PartSettings, Positive, Section, meant, validated
from codedinvnet.common.errors import UserError
from codedinvnet.common.files import read_json
from codedinvnet.common.grid import expand
from codedinvnet.models.bundle import BundleInfo

Base = Literal["invertible", "resnet"]
GroupSize = Annotated[int, Field(ge=2)]
Count = Annotated[int, Field(ge=0, lt=2**63)]
Patterns = Annotated[int, Field(gt=0, le=1000)]
"""Erasure patterns; a thousand say enough."""
GRID = Path(__file__).with_name("accuracy.json")
"""The grid of the shipped rows."""


class DataSetSettings(Section):
    """One image set: the bundle that serves it, and budgets for what is trained.

    Keys besides these are budgets of methods' parts: `backup` of every method with that
    `Method.part`, of the type `Method.budget`.
    """

    model_config = ConfigDict(extra="allow")

    bundle: str
    """A shipped bundle's name, or a folder."""
    classifier: PartSettings | None = None
    """Of the plain base model."""

    def budget(self, part: str) -> Any:
        """Return the budget of a part, or of the `classifier`; None if there is none."""
        return self.classifier if part == "classifier" else self.budgets.get(part)

    @property
    def budgets(self) -> Mapping[str, Any]:
        """The budgets of methods' parts."""
        return self.model_extra or {}


class Block(Section):
    """A product of choices, each combination a trial."""

    methods: Annotated[tuple[str, ...], Field(min_length=1)]
    datasets: Annotated[tuple[str, ...], Field(min_length=1)] | None = None
    """None: all of the grid's."""
    bases: Annotated[tuple[Base, ...], Field(min_length=1)] = ("invertible",)
    k: Annotated[tuple[GroupSize, ...], Field(min_length=1)] = (2, 4, 10)
    missing: Annotated[tuple[Count, ...], Field(min_length=1)] = (1,)
    seeds: Annotated[tuple[Count, ...], Field(min_length=1)] = (1,)
    """Of what is trained; a trial in which nothing is trained uses only the first."""
    groupings: Positive | None = None
    """Fewer than the grid's, for what is slow."""
    patterns: Patterns | None = None
    """In place of the grid's, where several workers are missing."""


class AccuracyGrid(Section):
    """A grid file of `bench accuracy`."""

    name: Annotated[str, Field(pattern=r"^\w[\w.-]*$")]
    datasets: Annotated[dict[str, DataSetSettings], Field(min_length=1)]
    groupings: Positive = 5
    """Random groupings of the test images; the same for every method at one k."""
    grouping_seed: Count = 0
    patterns: Patterns = 30
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
    seed: int
    bundle: str
    groupings: int = 1
    patterns: int = 30

    def name(self) -> str:
        """Return it in words."""
        return (
            f"{self.label} on {self.dataset} ({self.base}), k = {self.k}, "
            f"{self.missing} missing, seed {self.seed}"
        )

    @property
    def place(self) -> dict[str, Any]:
        """Its coordinates, the columns of its row."""
        return {n: v for n, v in asdict(self).items() if n not in ("groupings", "patterns")}

    @property
    def trained(self) -> bool:
        """Whether it depends on weights that the benchmark trains, and so on a seed."""
        return self.base == "resnet" or bool(find_method(self.method).part)


def load_grid(path: Path, methods: Iterable[str] = ()) -> AccuracyGrid:
    """Read and validate a grid, which may have budgets of a user's own `methods` as well."""
    grid = validated(AccuracyGrid, read_json(path, "the grid"), path, strict=True)
    for number, block in enumerate(grid.blocks):
        where = f"{path}: blocks.{number}"
        for name in block.datasets or ():
            if name not in grid.datasets:
                known = tuple(grid.datasets)
                raise UserError(f"{where}.datasets: unknown {name!r}: {meant(name, known)}")
        for name in block.methods:
            try:
                method = find_method(name)
            except UnknownMethod as error:
                told = f"{where}.methods: unknown {name!r}: {meant(name, METHODS)}"
                raise UserError(told) from error
            if method.of_bundle and "resnet" in block.bases:
                raise UserError(f"{where}.bases: {name} needs the invertible base model")
            for dataset in block.datasets or grid.datasets:
                for base in block.bases:
                    check_part(grid, method, dataset, path, base)
    named = [*methods, *(name for block in grid.blocks for name in block.methods)]
    return _with_budgets(grid, path, [*METHODS.values(), *map(find_method, named)])


def _with_budgets(grid: AccuracyGrid, path: Path, methods: Iterable[Method]) -> AccuracyGrid:
    """Return a grid whose budgets are of the types that methods say."""
    kinds = {method.part: method.budget for method in methods if method.part}
    datasets = {}
    for name, settings in grid.datasets.items():
        typed = {}
        for part, raw in settings.budgets.items():
            key = f"datasets.{name}.{part}"
            if part not in kinds:
                known = ("bundle", "classifier", *kinds)
                raise UserError(f"{path}: unknown key {key!r}: {meant(part, known)}")
            typed[part] = validated(kinds[part], raw, f"{path}: {key}", strict=True)
        datasets[name] = settings.model_copy(update=typed)
    return grid.model_copy(update={"datasets": datasets})


def check_part(
    grid: AccuracyGrid, method: Method, dataset: str, path: Path, base: Base = "invertible"
) -> None:
    """Refuse a method whose part, or base model, the grid does not say how to train."""
    needed = {method.part: method.name, "classifier" if base == "resnet" else "": "the base resnet"}
    for part, reason in needed.items():
        if part and grid.datasets[dataset].budget(part) is None:
            raise UserError(f"{path}: missing key 'datasets.{dataset}.{part}' for {reason}")


def is_foreign(text: str) -> bool:
    """Return whether a text names a method of a user's file."""
    return ":" in text


def with_methods(grid: AccuracyGrid, texts: Iterable[str], missing: int = 1) -> AccuracyGrid:
    """Return a grid with methods of others, tried in the places of its first block.

    They are named as `FILE.py:CLASS`. Each has a block of its own, without the plain base model if
    it is made around a bundle. As many workers are `missing` as in the block whose patterns and
    groupings it takes, if there is one, so that the same groups lose the same workers.
    """
    first = grid.blocks[0]
    like = next((block for block in grid.blocks if missing in block.missing), first)
    sizes = tuple(k for k in first.k if k > missing)
    if not sizes:
        raise UserError(f"--missing {missing}: the grid's groups have at most {max(first.k)}")
    there = {find_method(name).name for block in grid.blocks for name in block.methods}
    blocks = list(grid.blocks)
    for text in filter(is_foreign, texts):
        method = find_method(text)
        if method.name not in there:
            changes: dict[str, Any] = {"methods": (text,), "missing": (missing,), "k": sizes}
            changes |= {"groupings": like.groupings, "patterns": like.patterns}
            if method.of_bundle:
                changes["bases"] = ("invertible",)
            blocks.append(first.model_copy(update=changes))
    return grid.model_copy(update={"blocks": tuple(blocks)})


def trials(grid: AccuracyGrid) -> Iterator[Trial]:
    """Yield the grid's trials, each once, so that those that share weights follow each other."""
    seen: set[Trial] = set()
    for block in grid.blocks:
        for place in expand(
            dataset=block.datasets or grid.datasets,
            base=block.bases,
            method=[find_method(text).name for text in block.methods],
            seed=block.seeds,
            k=block.k,
            missing=block.missing,
        ):
            trial = Trial(
                label=place["method"],
                bundle=grid.datasets[place["dataset"]].bundle,
                groupings=min(block.groupings or grid.groupings, grid.groupings),
                patterns=block.patterns or grid.patterns,
                **place,
            )
            alike = trial if trial.trained else replace(trial, seed=0)
            if alike not in seen:
                seen.add(alike)
                yield trial


def check_possible(trial: Trial, bundle: BundleInfo, images: int | None) -> None:
    """Refuse a trial that its bundle, or the number of test images if that is known, rules out."""
    if images is not None and trial.k > images:
        raise UserError(f"{trial.name()}: there are only {images} test images")
    try:
        find_method(trial.method).check(trial.k, bundle.input.shape, bundle)
    except UserError as error:
        raise UserError(f"{trial.name()}: {error}") from error
    if trial.missing >= trial.k:
        raise UserError(f"{trial.name()}: at least one worker must answer")
