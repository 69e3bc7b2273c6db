"""The grid of `bench latency`: what its settings file says, and the runs it stands for."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, ValidationError, model_validator

from codedinvnet.codes.registry import find_method
from codedinvnet.config import Positive, Section, describe, meant, validated
from codedinvnet.engines import PYTORCH, EngineName
from codedinvnet.errors import UserError
from codedinvnet.evaluation.trials import Count, GroupSize
from codedinvnet.files import read_json
from codedinvnet.scheduler.settings import MAX_BATCH, coded_too_late
from codedinvnet.serving.policies import SERVED, Served, served_as
from codedinvnet.serving.workers.faults import Fault, check_workers
from codedinvnet.simulation.stragglers import Straggler, stragglers

QUICK_QUERIES = 3000


Milliseconds = Annotated[float, Field(gt=0)]
Load = Annotated[float, Field(gt=0, lt=1)]


class LatencyBlock(Section):
    """A product of choices; each combination is one arm, which is run several times."""

    batches: Annotated[tuple[Annotated[int, Field(ge=1, le=MAX_BATCH)], ...], Field(min_length=1)]
    """Images of a request, which is answered with its last one."""
    loads: Annotated[tuple[Load, ...], Field(min_length=1)]
    """Shares of the capacity."""
    stragglers: Annotated[tuple[str, ...], Field(min_length=1)]
    """Names of the simulator's models, or faults files."""
    methods: Annotated[tuple[str, ...], Field(min_length=1)] = tuple(SERVED)


class LatencyGrid(Section):
    """A grid file of `bench latency`."""

    name: Annotated[str, Field(pattern=r"^\w[\w.-]*$")]
    bundle: str
    """A shipped bundle's name, or a folder."""
    engine: EngineName = PYTORCH
    """What computes the networks in a worker."""
    k: GroupSize = 10
    workers: Positive = 11
    wait_ms: Milliseconds
    """A query's task keeps its worker so long besides computing, without a processor, a parity as
    much longer as it has more to compute."""
    service_ms: Milliseconds
    """The mean service time that loads and stragglers refer to: the wait and the forward pass."""
    group_timeout_ms: Milliseconds = 20.0
    hang_timeout_ms: Milliseconds = 3000.0
    deadline_ms: Milliseconds = 5000.0
    queries: Positive = 10_000
    """Images of one run."""
    runs: Positive = 3
    seed: Count = 0
    parts: Path
    """The grid of `bench accuracy` that says how parts are trained, beside this file."""
    blocks: Annotated[tuple[LatencyBlock, ...], Field(min_length=1)]

    @model_validator(mode="after")
    def _fits(self) -> LatencyGrid:
        if self.wait_ms >= self.service_ms:
            raise ValueError(
                f"service_ms must be above the wait_ms of {self.wait_ms:g} that it has in it"
            )
        if why := coded_too_late(self.group_timeout_ms, self.deadline_ms):
            raise ValueError(f"group_timeout_ms {why}")
        return self

    @property
    def capacity_qps(self) -> float:
        """Images a second at which all workers would be busy with data tasks alone."""
        return 1000 * self.workers / self.service_ms


@dataclass(frozen=True)
class Arm:
    """One run of one method in one setting: a row of the results."""

    label: str
    """As `served_as` takes it."""
    batch: int
    load: float
    stragglers: str
    run: int

    @property
    def served(self) -> Served:
        """How it is served."""
        return served_as(self.label)

    def name(self) -> str:
        """Return it in words."""
        images = "single images" if self.batch == 1 else f"batches of {self.batch}"
        return f"{images} at {self.load:.0%}, {self.stragglers}: {self.label}, run {self.run}"

    def as_dict(self) -> dict[str, Any]:
        """Return it for a row."""
        return {
            "label": self.label,
            "policy": self.served.policy,
            "method": self.served.method,
            "backup": self.served.backup,
            "batch": self.batch,
            "load": self.load,
            "straggler_model": self.stragglers,
            "run": self.run,
        }


def load_latency_grid(path: Path) -> LatencyGrid:
    """Read and validate a grid.

    Raises:
        UserError: one line, if it cannot be read, a key or value is wrong, a method or straggler
            model is unknown, or there are too few workers.
    """
    raw = read_json(path, "the grid")
    grid = validated(LatencyGrid, raw, path, strict=True)
    for number, block in enumerate(grid.blocks):
        for name in block.methods:
            try:
                served = served_as(name)
            except UserError as error:
                told = str(error) if ".py:" in name else f"unknown {name!r}: {meant(name, SERVED)}"
                raise UserError(f"{path}: blocks.{number}.methods: {told}") from error
            if served.rules.coded:
                needed = len(find_method(served.method).rules(grid.k).tasks(grid.k))
                if grid.workers < needed:
                    raise UserError(
                        f"{path}: workers: {name} with k = {grid.k} needs {needed}, "
                        f"got {grid.workers}"
                    )
            if (copies := served.rules.copies) > grid.workers:
                raise UserError(f"{path}: workers: {name} needs {copies}, got {grid.workers}")
        for model, batch in product(block.stragglers, block.batches):
            try:
                check_workers(injected(model, grid.service_ms, batch), grid.workers)
            except UserError as error:
                raise UserError(f"{path}: blocks.{number}.stragglers: {error}") from error
    return grid.model_copy(update={"parts": path.parent / grid.parts})


def quick_grid(grid: LatencyGrid) -> LatencyGrid:
    """Return the first setting of a grid with all its methods, one run each of 3,000 queries."""
    first = grid.blocks[0]
    block = first.model_copy(
        update={
            "batches": first.batches[:1],
            "loads": first.loads[:1],
            "stragglers": first.stragglers[:1],
        }
    )
    queries = min(grid.queries, QUICK_QUERIES)
    return grid.model_copy(update={"blocks": (block,), "runs": 1, "queries": queries})


def arms(grid: LatencyGrid) -> Iterator[Arm]:
    """Yield the runs of a grid, each once, block by block.

    Within a block every arm has its first run before any has its second, so that what disturbs the
    machine for a while meets them all.
    """
    seen: set[Arm] = set()
    for block in grid.blocks:
        settings = product(block.batches, block.loads, block.stragglers, block.methods)
        for run, (batch, load, model, label) in product(range(1, grid.runs + 1), tuple(settings)):
            arm = Arm(label, batch, load, model, run)
            if arm not in seen:
                seen.add(arm)
                yield arm


FILTERS = {
    "method": ("label", str),
    "batch": ("batch", int),
    "load": ("load", float),
    "stragglers": ("stragglers", str),
    "run": ("run", int),
}
"""Key of `--only` -> the field of an arm, and its type."""


def chosen(wanted: Sequence[Arm], only: Sequence[str]) -> list[Arm]:
    """Return the runs that fit words like `method=coded`: of one key any value, of all keys one.

    Raises:
        UserError: if a word is not KEY=VALUE, or no run has that value.
    """
    asked: dict[str, set[Any]] = {}
    for word in only:
        key, found, value = word.partition("=")
        if not found or key not in FILTERS:
            raise UserError(f"--only: {word!r} is not KEY=VALUE with KEY of {', '.join(FILTERS)}")
        field, kind = FILTERS[key]
        there = {getattr(arm, field) for arm in wanted}
        try:
            given = kind(value)
        except ValueError:
            given = None
        if given not in there:
            known = ", ".join(str(value) for value in sorted(there))
            raise UserError(f"--only: the grid has no {word}; its values: {known}")
        asked.setdefault(field, set()).add(given)
    return [arm for arm in wanted if all(getattr(arm, f) in v for f, v in asked.items())]


def injected(model: str, service_ms: float, batch: int) -> list[Fault]:
    """Return the faults that make the service's workers straggle as the simulator's do.

    A worker that is slower for good is blocked for the difference, since the service cannot slow
    its computing.

    Args:
        model: name of a straggler model, or a faults file.
        service_ms: the mean service time.
        batch: images of a request.

    Raises:
        UserError: if it is neither, or if the service cannot inject it.
    """
    return [
        _fault(model, straggler, service_ms) for straggler in stragglers(model, service_ms, batch)
    ]


def _fault(model: str, straggler: Straggler, service_ms: float) -> Fault:
    raw = straggler.model_dump(exclude_none=True, exclude={"delay", "factor"})
    if straggler.kind == "factor":
        assert straggler.factor is not None
        raw |= {"kind": "slow", "delay": {"ms": (straggler.factor - 1) * service_ms}}
    elif straggler.delay is not None:
        delay = straggler.delay.model_dump(exclude_defaults=True)
        raw["delay"] = {"ms": straggler.delay.ms, **delay}
    try:
        return Fault.model_validate(raw)
    except ValidationError as error:
        raise UserError(
            f"{model!r}: the service cannot inject {straggler.kind!r} like this "
            f"({describe(error, Fault)}): use `codedinvnet simulate`"
        ) from error
