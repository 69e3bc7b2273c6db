"""`codedinvnet bench latency`: every method's tail latency on the real service, one resumable grid.

Every run starts a service of its own and loads it in an open loop. Its workers share this machine's
few cores, so tasks wait a stated time besides computing: workers behave as machines of their own
as long as the processors are idle most of the time, which a row tells.
"""

from __future__ import annotations

import asyncio
import json
import math
import os
import random
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from itertools import product
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import Field, model_validator

from codedinvnet.codes.build import part_beside, scheme_for
from codedinvnet.codes.equal_cost import count_macs, macs
from codedinvnet.codes.named_policies import SERVED, Served, served_as
from codedinvnet.codes.registry import find_method
from codedinvnet.common.config import Positive, Section, meant, validated
from codedinvnet.common.engines import PYTORCH, EngineName, check_installed
from codedinvnet.common.errors import UserError
from codedinvnet.common.faults import Fault, check_workers
from codedinvnet.common.files import check_writable, file_digest, read_json
from codedinvnet.common.grid import Cell, resume, select
from codedinvnet.data import ImageSource
from codedinvnet.evaluation.service import (
    ParityWait,
    answer_figures,
    injected,
    latency_figures,
    schedule,
    serving,
    work_figures,
)
from codedinvnet.evaluation.stages import images_of
from codedinvnet.evaluation.trials import Count, GroupSize
from codedinvnet.models.bundle import load_bundle, weights_digest
from codedinvnet.scheduler.settings import MAX_BATCH, coded_too_late

START_SECONDS = 10
"""What starting, warming and stopping a service takes, for the time left."""
QUICK_QUERIES = 3000
Milliseconds = Annotated[float, Field(gt=0)]


class LatencyBlock(Section):
    """A product of choices; each combination is run several times."""

    batches: Annotated[tuple[Annotated[int, Field(ge=1, le=MAX_BATCH)], ...], Field(min_length=1)]
    """Images of a request, which is answered with its last one."""
    loads: Annotated[tuple[Annotated[float, Field(gt=0, lt=1)], ...], Field(min_length=1)]
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
    """How long a query's task keeps its worker besides computing, without a processor; a parity
    waits longer in proportion to its cost."""
    service_ms: Milliseconds
    """The mean service time that loads and stragglers refer to: the wait and the forward pass."""
    group_timeout_ms: Milliseconds = 20.0
    hang_timeout_ms: Milliseconds = 3000.0
    deadline_ms: Milliseconds = 5000.0
    queries: Positive = 10_000
    """Images of one run."""
    runs: Positive = 3
    seed: Count = 0
    blocks: Annotated[tuple[LatencyBlock, ...], Field(min_length=1)]

    @model_validator(mode="after")
    def _fits(self) -> LatencyGrid:
        if self.wait_ms >= self.service_ms:
            raise ValueError(f"service_ms must be above the wait_ms of {self.wait_ms:g}")
        if why := coded_too_late(self.group_timeout_ms, self.deadline_ms):
            raise ValueError(f"group_timeout_ms {why}")
        return self


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

    @property
    def place(self) -> dict[str, Any]:
        """Its coordinates, by their names on the command line."""
        return {"method": self.label, **{n: v for n, v in vars(self).items() if n != "label"}}

    def name(self) -> str:
        """Return it in words."""
        images = "single images" if self.batch == 1 else f"batches of {self.batch}"
        return f"{images} at {self.load:.0%}, {self.stragglers}: {self.label}, run {self.run}"


def load_latency_grid(path: Path) -> LatencyGrid:
    """Read and validate a grid."""
    grid = validated(LatencyGrid, read_json(path, "the grid"), path, strict=True)
    for number, block in enumerate(grid.blocks):
        where = f"{path}: blocks.{number}"
        for name in block.methods:
            try:
                served = served_as(name)
            except UserError as error:
                why = str(error) if ".py:" in name else f"unknown {name!r}: {meant(name, SERVED)}"
                raise UserError(f"{where}.methods: {why}") from error
            needed = served.rules.copies
            if served.rules.coded:
                needed = len(find_method(served.method).rules(grid.k).tasks(grid.k))
            if needed > grid.workers:
                raise UserError(
                    f"{path}: workers: {name} with k = {grid.k} needs {needed}, got {grid.workers}"
                )
        for model, batch in product(block.stragglers, block.batches):
            try:
                check_workers(injected(model, grid.service_ms, batch), grid.workers)
            except UserError as error:
                raise UserError(f"{where}.stragglers: {error}") from error
    return grid


def quick_grid(grid: LatencyGrid) -> LatencyGrid:
    """Return the first setting of a grid with all its methods, one run each of 3,000 queries."""
    first = grid.blocks[0]
    axes = ("batches", "loads", "stragglers")
    block = first.model_copy(update={axis: getattr(first, axis)[:1] for axis in axes})
    queries = min(grid.queries, QUICK_QUERIES)
    return grid.model_copy(update={"blocks": (block,), "runs": 1, "queries": queries})


def arms(grid: LatencyGrid) -> list[Arm]:
    """Return the runs of a grid, each once, block by block.

    Within a block every arm has its first run before any has its second, so that what disturbs the
    machine for a while meets them all.
    """
    found = (
        Arm(label, batch, load, model, run)
        for block in grid.blocks
        for run, batch, load, model, label in product(
            range(1, grid.runs + 1), block.batches, block.loads, block.stragglers, block.methods
        )
    )
    return list(dict.fromkeys(found))


def run(
    grid_file: Path,
    *,
    out: Path,
    data_dir: Path | None,
    log: Path,
    download: bool = False,
    quick: bool = False,
    only: Sequence[str] = (),
) -> dict[str, Any]:
    """Do the runs of a grid that have no row yet, and return how many were done, kept and failed.

    Args:
        grid_file: the grid's settings.
        out: the rows.
        data_dir: where the image sets lie.
        log: where the servers' logs go.
        download: download image sets into `data_dir`.
        quick: one setting, one run of 3,000 queries for each method.
        only: words `KEY=VALUE` that runs must fit.
    """
    grid = load_latency_grid(grid_file)
    if quick:
        grid = quick_grid(grid)
    wanted = select(arms(grid), only, lambda arm: arm.place)
    check_writable(out)
    check_writable(log)
    if out.absolute() == log.absolute():
        raise UserError(f"--log: {log} is where the rows go: name another file")
    data = load_bundle(grid.bundle).info.provenance.settings.data
    bench = LatencyBench(grid, quick, images_of(data, "test", data_dir, download), log)
    return {"runs": len(wanted), **resume([bench.cell(arm) for arm in wanted], out)}


class LatencyBench:
    """Makes the cells of a grid.

    Args:
        grid: their settings.
        quick: noted in the rows.
        test: the bundle's test images.
        log: where the servers' logs go.

    Raises:
        UserError: if the bundle or the engine is not there, k is none of the bundle's group sizes,
            or a method's trained part is not in the bundle's folder.
    """

    def __init__(self, grid: LatencyGrid, quick: bool, test: ImageSource, log: Path) -> None:
        self.grid, self.quick, self.test, self.log = grid, quick, test, log
        check_installed(grid.engine)
        self.bundle = load_bundle(grid.bundle)
        sizes = self.bundle.info.group_sizes
        if grid.k not in sizes:
            raise UserError(f"bundle {grid.bundle!r} serves groups of {sizes[0]} to {sizes[-1]}")
        names = {name for block in grid.blocks for name in block.methods}
        self.dataset = self.bundle.info.provenance.settings.data.name
        for method in (find_method(served_as(name).method) for name in names):
            if method.part and part_beside(self.bundle.folder, method, grid.k) is None:
                raise UserError(
                    f"methods: {method.name} needs its trained part: copy what `bench accuracy` "
                    f"left to {self.bundle.folder}/{method.name}-k{grid.k}.safetensors"
                )
        pixels, labels = self.test.batch(torch.arange(len(self.test)))
        self.images, self.labels = pixels.numpy(), labels.numpy()

    def cell(self, arm: Arm) -> Cell:
        """Return a run as a cell of the grid."""
        grid = self.grid
        faults = injected(arm.stragglers, grid.service_ms, arm.batch)
        seconds = START_SECONDS + grid.queries / self.rate(arm)
        place = {**arm.place, "dataset": self.dataset}
        place |= {"label": place.pop("method"), "straggler_model": place.pop("stragglers")}
        method = find_method(arm.served.method)
        settings: dict[str, Any] = {
            **grid.model_dump(mode="json", exclude={"name", "runs", "blocks"}),
            "weights": weights_digest(grid.bundle),
            "test_images": len(self.test),
            "quick": self.quick,
        }
        if (part := part_beside(self.bundle.folder, method, grid.k)) is not None:
            settings["part"] = file_digest(part)
        if identity := dict(method.identity()):
            settings["method"] = identity
        if (wait := self.parity_wait(arm)) is not None:
            settings["parity_wait_ms"] = [wait.task, wait.image]
        settings["stragglers"] = [f.model_dump(mode="json", exclude_defaults=True) for f in faults]
        measure = partial(self.measure, arm, faults)
        return Cell("latency", place, settings, measure, arm.name(), seconds)

    def parity_wait(self, arm: Arm) -> ParityWait | None:
        """Return what a parity waits, or what `auto` asks the small backup; None without those.

        What encodes k images waits `wait_ms` times its multiply-adds over f's, shared among the
        images. What takes the images as they are waits its cost, shared among them.
        """
        grid, served = self.grid, arm.served
        method = find_method(served.method)
        extra = method.rules(grid.k, bundle=self.bundle.info).tasks(grid.k).get(grid.k)
        if not served.rules.takes_code or extra is None:
            return None
        share = len(extra.members) / grid.k
        if not extra.encoded:
            image = extra.cost * grid.wait_ms / len(extra.members)
            return ParityWait(0.0, round(image, 4), share)
        model = self.bundle.model
        scheme = scheme_for(self.bundle, grid.k, method.name)
        group = torch.zeros(1, grid.k, *scheme.shape)
        encoding = count_macs(lambda: scheme.encode(grid.k, group)) if method.encodes else 0
        image = encoding / macs(model.network, model) * grid.wait_ms / grid.k
        return ParityWait(extra.cost * grid.wait_ms, round(image, 4), share)

    def seed(self, arm: Arm) -> int:
        """Return the seed of a run's arrivals, images and faults: the same for all methods.

        Every setting and run has another one: with one for a run's number, all settings of it
        would meet one sequence of gaps, and lull and rush together.
        """
        words = (self.grid.seed, arm.batch, arm.load, arm.stragglers, arm.run)
        return zlib.crc32(json.dumps(words).encode())

    def rate(self, arm: Arm) -> float:
        """Return images a second."""
        return arm.load * 1000 * self.grid.workers / self.grid.service_ms

    def measure(self, arm: Arm, faults: Sequence[Fault]) -> dict[str, Any]:
        """Serve, load, and return the figures of a run."""
        grid, served, seed, wait = self.grid, arm.served, self.seed(arm), self.parity_wait(arm)
        rate = self.rate(arm)
        words = [
            *(grid.bundle, "--policy", served.policy, "--method", served.method),
            *("--k", str(grid.k), "--workers", str(grid.workers)),
            *("--deadline-ms", str(grid.deadline_ms), "--set", f"engine={grid.engine}"),
            *("--set", f"group-timeout-ms={grid.group_timeout_ms}"),
            *("--set", f"hang-timeout-ms={grid.hang_timeout_ms}"),
        ]
        chooser, count = random.Random(seed), math.ceil(grid.queries / arm.batch)
        requests = [
            [chooser.randrange(len(self.images)) for _ in range(arm.batch)] for _ in range(count)
        ]
        run = asyncio.run(
            serving(
                words,
                schedule(grid.wait_ms, grid.k, wait, faults),
                seed=seed,
                model=self.bundle.info.name,
                images=self.images,
                requests=requests,
                rate=rate / arm.batch,
                label=arm.label,
                log=self.log,
            )
        )
        names = (
            *("workers", "k", "bundle", "wait_ms", "service_ms"),
            *("group_timeout_ms", "hang_timeout_ms", "deadline_ms"),
        )
        return {
            "name": arm.name(),
            **{"policy": served.policy, "method": served.method},
            **{name: getattr(grid, name) for name in names},
            "r": served.scenario.get("r", 1),
            "apart": self.bundle.model.encoder.keeps_apart,
            "qps": round(rate, 3),
            "requests": len(requests),
            "stragglers": [f.model_dump(mode="json", exclude_defaults=True) for f in faults],
            "seed": seed,
            "cores": os.cpu_count(),
            **latency_figures(run.replies),
            **answer_figures(run.replies, self.labels),
            **work_figures(run, grid.wait_ms, wait),
            **run.busy,
        }
