"""`codedinvnet bench latency`: every method's tail latency on the real service, one resumable grid.

Every run starts a service of its own and loads it in an open loop. Its eleven workers share this
machine's few cores, so tasks wait a stated time besides computing: workers behave as machines
of their own as long as the processors are idle most of the time, which a row tells.
"""

from __future__ import annotations

import asyncio
import json
import math
import os
import random
import zlib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from codedinvnet import study
from codedinvnet.codes.equal_cost import macs
from codedinvnet.codes.method import Method, given_by
from codedinvnet.codes.registry import OURS, find_method
from codedinvnet.data import ImageSource, Split
from codedinvnet.engines import check_installed
from codedinvnet.errors import UserError
from codedinvnet.evaluation import methods
from codedinvnet.evaluation.client import Reply
from codedinvnet.evaluation.latency_grid import (
    Arm,
    LatencyGrid,
    arms,
    chosen,
    injected,
    load_latency_grid,
    quick_grid,
)
from codedinvnet.evaluation.parts import DataSet
from codedinvnet.evaluation.quantiles import SHARES, quantiles
from codedinvnet.evaluation.service import (
    ParityWait,
    latency_figures,
    schedule,
    serving,
    work_figures,
)
from codedinvnet.evaluation.trials import AccuracyGrid, Trial, check_part, load_grid
from codedinvnet.files import check_folder, check_writable
from codedinvnet.models.bundle import (
    Bundle,
    load_bundle,
    weights_digest,
)
from codedinvnet.rows import Row, key_of, newest, read_rows
from codedinvnet.serving.policies import served_as
from codedinvnet.serving.workers.faults import Fault
from codedinvnet.stages import images_of

SAMPLED = ("service", "encode", "trip")
"""What of `GET /times` a scenario of the run needs."""
START_SECONDS = 10
"""What starting, warming and stopping a service takes, for the time left."""
PART_SEED = 1


def run(
    grid_file: Path,
    *,
    out: Path,
    save_dir: Path,
    data_dir: Path | None,
    log: Path,
    download: bool = False,
    quick: bool = False,
    only: Sequence[str] = (),
) -> dict[str, Any]:
    """Do the runs of a grid that are not done yet, one row each.

    A run that raises becomes a row with its error, and is tried again by the next call.

    Args:
        grid_file: the grid's settings.
        out: the rows.
        save_dir: trained parts go where `bench accuracy` keeps it.
        data_dir: where the image sets lie.
        log: where the servers' logs go.
        download: download image sets into `data_dir`.
        quick: one setting, one run of 3,000 queries for each method, hastily trained parts.
        only: words `KEY=VALUE` that runs must fit.

    Returns:
        How many runs were asked for, done now, kept, and failed.

    Raises:
        UserError: one line, before any work, if the grid asks for what cannot be done.
    """
    grid = load_latency_grid(grid_file)
    if quick:
        grid = quick_grid(grid)
    wanted = chosen(list(arms(grid)), only)
    bench = LatencyBench(grid, quick, save_dir, data_dir, download, log)
    settings = {arm: bench.settings(arm) for arm in wanted}
    done = newest(read_rows(out, "latency"))
    check_writable(out)
    check_writable(log)
    check_folder(save_dir, "--save-dir")
    if out.absolute() == log.absolute():
        raise UserError(f"--log: {log} is where the rows go: name another file")
    keys = {arm: key_of(arm.as_dict(), settings[arm]) for arm in wanted}
    todo = [arm for arm in wanted if not bench.is_done(arm, done.get(keys[arm]))]
    for name in {arm.served.method for arm in todo}:
        bench.train_part(find_method(name))  # before anything is measured: it takes processors
    seconds = sum(map(bench.expected_seconds, todo))
    jobs = [bench.job(arm, settings[arm], keys[arm]) for arm in todo]
    counts = study.run(jobs, out, f"latency, about {math.ceil(seconds / 60)} min")
    return {"runs": len(wanted), "kept": len(wanted) - len(todo), **counts}


class LatencyBench:
    """Does runs.

    Args:
        grid: their settings.
        quick: noted in the rows; parts are trained in seconds.
        save_dir: see `run`.
        data_dir: see `run`.
        download: see `run`.
        log: see `run`.

    Raises:
        UserError: if the bundle, its images or the engine are not there, or k is none of the
            bundle's group sizes.
    """

    def __init__(
        self,
        grid: LatencyGrid,
        quick: bool,
        save_dir: Path,
        data_dir: Path | None,
        download: bool,
        log: Path,
    ) -> None:
        self.grid, self.quick, self.save_dir, self.log = grid, quick, save_dir, log
        self.data_dir, self.download = data_dir, download
        check_installed(grid.engine)
        self.bundle: Bundle = load_bundle(grid.bundle)
        sizes = self.bundle.info.group_sizes
        if grid.k not in sizes:
            raise UserError(f"bundle {grid.bundle!r} serves groups of {sizes[0]} to {sizes[-1]}")
        names = {name for block in grid.blocks for name in block.methods}
        if not find_method(OURS).rules(grid.k, bundle=self.bundle.info).guesses:
            for name in names:
                if served_as(name).rules.guessing:
                    raise UserError(f"methods: {name} needs a bundle that guesses: leave it out")
        self.dataset = self.bundle.info.provenance.settings.data.name
        self.test = self._load("test")
        images, labels = self.test.batch(torch.arange(len(self.test)))
        self.images, self.labels = images.numpy(), labels.numpy()
        self.parts: dict[str, Path] = {}
        needed = {find_method(served_as(name).method) for name in names}
        parts = [method for method in needed if method.part]
        self.part_settings = self._part_settings(parts) if parts else None
        self.encode_shares = {method.name: self._encode_share(method) for method in needed}

    def _load(self, split: Split) -> ImageSource:
        """Read the bundle's image set, as large as it was trained on."""
        data = self.bundle.info.provenance.settings.data
        return images_of(data, split, self.data_dir, self.download)

    def _part_settings(self, wanted: Iterable[Method]) -> AccuracyGrid:
        """Return the grid of `bench accuracy` that trains the parts of methods.

        Raises:
            UserError: if it does not say how, or has another bundle.
        """
        grid = load_grid(self.grid.parts)
        found = grid.datasets.get(self.dataset)
        if found is None or found.bundle != self.grid.bundle:
            raise UserError(
                f"{self.grid.parts}: datasets.{self.dataset} must have the bundle "
                f"{self.grid.bundle!r}, for parts to be trained by it"
            )
        for method in wanted:
            check_part(grid, method, self.dataset, self.grid.parts)
        return methods.quick_grid(grid) if self.quick else grid

    def _settings_of(self, method: Method) -> Any:
        """Return how a method's part is trained; None without one."""
        if not method.part or self.part_settings is None:
            return None
        return getattr(self.part_settings.datasets[self.dataset], method.part)

    def _encode_share(self, method: Method) -> float:
        """Return what a method's encoding costs for k images in embeddings, by multiply-adds."""
        given, model = given_by(self.bundle, self.grid.k), self.bundle.model
        return method.encoding_macs(given, self._settings_of(method)) / macs(model.network, model)

    def settings(self, arm: Arm) -> dict[str, Any]:
        """Return everything that a run's figures depend on beside the arm."""
        grid = self.grid
        found: dict[str, Any] = {
            **grid.model_dump(mode="json", exclude={"name", "runs", "blocks", "parts"}),
            "weights": weights_digest(grid.bundle),
            "test_images": len(self.test),
            "quick": self.quick,
        }
        method = find_method(arm.served.method)
        if (own := self._settings_of(method)) is not None:
            found[method.part] = own.model_dump(mode="json")
        if identity := dict(method.identity()):
            found["method"] = identity
        if (wait := self.parity_wait(arm)) is not None:
            found["parity_wait_ms"] = [wait.task, wait.image]
        return found

    def parity_wait(self, arm: Arm) -> ParityWait | None:
        """Return what a parity waits, or what `auto` asks the small backup; None without those.

        What encodes k images is to `wait_ms` as its multiply-adds to f's, see `Method`. What takes
        the images as they are is charged its cost, shared among them.
        """
        grid = self.grid
        if not arm.served.rules.takes_code:
            return None
        method = find_method(arm.served.method)
        rules = method.rules(grid.k, bundle=self.bundle.info)
        extra = rules.tasks(grid.k).get(grid.k)
        if extra is None:
            return None
        share = len(extra.members) / grid.k
        if not extra.encoded:
            image = extra.cost * grid.wait_ms / len(extra.members)
            return ParityWait(0.0, round(image, 4), share)
        image = self.encode_shares[method.name] * grid.wait_ms / grid.k
        return ParityWait(extra.cost * grid.wait_ms, round(image, 4), share)

    def schedule(self, arm: Arm, faults: Sequence[Fault]) -> list[Fault]:
        """Return the waits of an arm's tasks, and what else goes wrong."""
        return schedule(self.grid.wait_ms, self.grid.k, self.parity_wait(arm), faults)

    def seed(self, arm: Arm) -> int:
        """Return the seed of a run's arrivals, images and faults.

        The same for all methods, and another in every setting and run: with one for a run's number,
        all settings of it would meet one sequence of gaps, and lull and rush together.
        """
        words = (self.grid.seed, arm.batch, arm.load, arm.stragglers, arm.run)
        return zlib.crc32(json.dumps(words).encode())

    def faults(self, arm: Arm) -> list[Fault]:
        """Return what makes an arm's workers straggle."""
        return injected(arm.stragglers, self.grid.service_ms, arm.batch)

    def is_done(self, arm: Arm, row: Row | None) -> bool:
        """Tell whether an arm's row stands: without an error, with today's faults and arrivals.

        A model's name, or a faults file's, says the same when what it stands for has changed.
        """
        if not study.finished(row) or row is None or row["seed"] != self.seed(arm):
            return False
        return bool(row["stragglers"] == _dumped(self.faults(arm)))

    def train_part(self, method: Method) -> None:
        """Train a method's part as `bench accuracy` does; one that it left is taken."""
        if not method.part:
            return
        assert self.part_settings is not None
        grid = self.part_settings
        data = DataSet(
            self.dataset,
            grid.datasets[self.dataset],
            self._load("train"),
            self.test,
            self.save_dir / "bench" / (grid.name + ("-quick" if self.quick else "")),
            torch.device("cpu"),
            methods.QUICK_TRAINING_IMAGES if self.quick else None,
        )
        trial = Trial(
            label=method.name,
            method=method.name,
            dataset=self.dataset,
            base="invertible",
            k=self.grid.k,
            missing=1,
            corrupt=0,
            seed=PART_SEED,
            bundle=self.grid.bundle,
            groupings=1,
        )
        self.parts[method.name] = data.part_file(trial)

    def rate(self, arm: Arm) -> float:
        """Return images a second."""
        return arm.load * self.grid.capacity_qps

    def expected_seconds(self, arm: Arm) -> int:
        """Return about how long a run takes."""
        return round(START_SECONDS + self.grid.queries / self.rate(arm))

    def job(self, arm: Arm, settings: Mapping[str, Any], key: str) -> study.Job:
        """Return a run as a row to measure."""
        grid = self.grid
        faults = self.faults(arm)
        header = {
            "kind": "latency",
            "key": key,
            "name": arm.name(),
            **arm.as_dict(),
            "dataset": self.dataset,
            "bundle": grid.bundle,
            "workers": grid.workers,
            "k": grid.k,
            "r": arm.served.scenario.get("r", 1),
            "apart": self.bundle.model.encoder.keeps_apart,
            "group_timeout_ms": grid.group_timeout_ms,
            "hang_timeout_ms": grid.hang_timeout_ms,
            "deadline_ms": grid.deadline_ms,
            "wait_ms": grid.wait_ms,
            "service_ms": grid.service_ms,
            "qps": round(self.rate(arm), 3),
            "requests": math.ceil(grid.queries / arm.batch),
            "stragglers": _dumped(faults),
            "seed": self.seed(arm),
            "settings": dict(settings),
            "cores": os.cpu_count(),
        }
        return study.Job(
            arm.name(),
            header,
            lambda: asyncio.run(self._measure(arm, faults, header)),
            self.expected_seconds(arm),
        )

    def _options(self, arm: Arm) -> list[str]:
        """Return the command line of the service."""
        grid, served = self.grid, arm.served
        words: dict[str, Any] = {
            "--policy": served.policy,
            "--method": served.method,
            "--k": grid.k,
            "--workers": grid.workers,
            "--deadline-ms": grid.deadline_ms,
        }
        rare: dict[str, Any] = {
            "group-timeout-ms": grid.group_timeout_ms,
            "hang-timeout-ms": grid.hang_timeout_ms,
            "engine": grid.engine,
        }
        if part := self.parts.get(find_method(served.method).name):
            rare["part"] = part
        pairs = [*words.items(), *(("--set", f"{name}={value}") for name, value in rare.items())]
        return [grid.bundle, *(str(word) for pair in pairs for word in pair)]

    async def _measure(self, arm: Arm, faults: Sequence[Fault], row: Row) -> dict[str, Any]:
        """Serve, load, and return the figures of a run."""
        chooser = random.Random(row["seed"])
        requests = [
            [chooser.randrange(len(self.images)) for _ in range(arm.batch)]
            for _ in range(row["requests"])
        ]
        async with serving(
            self._options(arm),
            self.schedule(arm, faults),
            seed=row["seed"],
            model=self.bundle.info.name,
            inputs={"images": self.images},
            first=requests,
            log=self.log,
        ) as service:
            rate = self.rate(arm) / arm.batch
            run = await service.load(requests, rate=rate, seed=row["seed"], label=arm.label)
        return {
            **latency_figures(run.replies),
            **answer_figures(run.replies, self.labels),
            **work_figures(run, self.grid.wait_ms, self.parity_wait(arm)),
            **self._times(arm, run.replies, run.times),
            **run.busy,
        }

    def _times(
        self, arm: Arm, replies: Sequence[Reply], times: Mapping[str, Any]
    ) -> dict[str, Any]:
        """Return the fitted times of a run, for the simulator, with the waits in them."""
        beyond = [max(0.0, 1000 * (r.latency - r.work)) for r in replies if r.ok]
        fitted: dict[str, Any] = {name: dict(times[name]) for name in SAMPLED if name in times}
        fitted["service"]["plus_ms"] = self.grid.wait_ms
        if "encode" in fitted and (wait := self.parity_wait(arm)):
            fitted["encode"]["plus_ms"] = wait.image
        if beyond:
            fitted["front_end"] = {
                "distribution": "empirical",
                "values_ms": quantiles(beyond),
                "shares": list(SHARES),
            }
        # Decoding is among what the front end costs.
        return {**fitted, "decode": {"distribution": "constant", "ms": 0.0}}


def _dumped(faults: Iterable[Fault]) -> list[dict[str, Any]]:
    """Return faults as they stand in a row."""
    return [fault.model_dump(mode="json", exclude_defaults=True) for fault in faults]


def answer_figures(replies: Sequence[Reply], truth: np.ndarray) -> dict[str, Any]:
    """Return how queries were answered; one without an answer counts as wrong.

    Args:
        replies: of all requests.
        truth: (images,) labels.
    """
    answered = [reply for reply in replies if reply.ok]
    queries = sum(len(reply.rows) for reply in replies)
    rows = np.array([row for reply in answered for row in reply.rows], np.int64)
    outcomes = np.array([outcome for reply in answered for outcome in reply.outcomes], str)
    labels = np.array([label for reply in answered for label in reply.labels], np.int64)
    right, decoded = labels == truth[rows], outcomes != "direct"
    count = int(decoded.sum())
    return {
        "queries": queries,
        "errors": len(replies) - len(answered),
        "missing_share": round(1 - len(rows) / queries, 6),
        "decoded_share": round(count / queries, 6),
        "accuracy": round(float(right.sum()) / queries, 6),
        "decoded_accuracy": round(float(right[decoded].mean()), 6) if count else None,
    }
