"""Fixtures and helpers: tiny images, settings and a trained bundle; the command line."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from copy import deepcopy
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import hypothesis
import numpy as np
import pytest
import torch

import benchmarks.command_line
from codedinvnet.cli import main, paper_main
from codedinvnet.codes import registry
from codedinvnet.common.config import Settings, parse_settings
from codedinvnet.data import ImageSet, sample_images
from codedinvnet.evaluation import stages
from codedinvnet.models.bundle import Bundle, load_bundle
from codedinvnet.training import precision

TRAINING_IMAGES, TEST_IMAGES = 800, 200

hypothesis.settings.register_profile(
    "patient",  # a busy machine takes long for any example
    deadline=None,
    suppress_health_check=[hypothesis.HealthCheck.too_slow],
    derandomize=True,  # what fails, fails again
)
hypothesis.settings.load_profile("patient")


class Outcome(NamedTuple):
    """What a command left behind."""

    code: int
    out: str
    err: str


Command: TypeAlias = Callable[..., Outcome]


def write_images(root: Path, train: int = TRAINING_IMAGES, test: int = TEST_IMAGES) -> Path:
    """Split the shipped MNIST images in two and write them as `mnist/{train,test}.npz`."""
    images = sample_images("mnist")
    folder = root / "mnist"
    folder.mkdir(parents=True)
    for split, rows in (("train", slice(0, train)), ("test", slice(train, train + test))):
        np.savez(
            folder / f"{split}.npz",
            images=images.images[rows, 0].numpy(),
            labels=images.labels[rows].numpy(),
            classes=np.array(images.classes),
        )
    return root


def tiny_settings(objective: str = "recovery", kind: str = "iresnet") -> dict[str, Any]:
    """Return settings that train in seconds, as they would stand in a settings file."""
    fusion: dict[str, Any] = {
        "pixels": {
            "objective": "pixels",
            "members": 2,
            "groups": 40,
            "epochs": 2,
            "batch_size": 4,
            "discriminator_steps": 2,
            "discriminator_filters": 4,
            "discriminator_layers": 2,
            "encoder": {"kind": "unet", "width": 4},
        },
        "recovery": {
            "objective": "recovery",
            "members": 4,
            "batch_size": 8,
            "steps_per_epoch": 4,
            "epochs": 2,
            "joint_batch_size": 4,
            "joint_epochs": 2,
            "encoder": {"kind": "lean", "width": 4},
        },
    }[objective]
    return {
        "name": f"tiny-{objective}",
        "seed": 3,
        "data": {"name": "mnist", "validation": 100, "padding": 2},
        "network": {"kind": kind, "blocks": [1, 1], "strides": [1, 2], "hidden": [8, 8]},
        "training": {"epochs": 3, "batch_size": 50, "learning_rate": 0.003, "init_batch": 200},
        "fusion": fusion,
    }


def put(raw: dict[str, Any], key: str, value: Any) -> dict[str, Any]:
    """Return settings with another value of a key, as `data.name`."""
    changed = deepcopy(raw)
    *sections, last = key.split(".")
    place = changed
    for section in sections:
        place = place[section]
    place[last] = value
    return changed


def write_settings(path: Path, raw: dict[str, Any]) -> Path:
    path.write_text(json.dumps(raw), encoding="utf-8")
    return path


def make_run(raw: dict[str, Any], save_dir: Path, data_dir: Path, resume: int = 0) -> stages.Run:
    settings: Settings = parse_settings(raw, "test")
    return stages.Run(settings, save_dir, data_dir, torch.device("cpu"), resume=resume)


def digests(*folders: Path) -> dict[str, str]:
    """Return the hash of every file below the folders."""
    return {
        str(path): hashlib.sha256(path.read_bytes()).hexdigest()
        for folder in folders
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


@pytest.fixture(scope="session")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that all processes of one `pytest -n` have in common."""
    own = tmp_path_factory.getbasetemp()
    return own.parent if "PYTEST_XDIST_WORKER" in os.environ else own


def once(folder: Path, make: Callable[[], None]) -> None:
    """Have a folder made by the first process that needs it; the others wait."""
    made = folder.with_suffix(".made")
    with folder.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not made.exists():
            shutil.rmtree(folder, ignore_errors=True)  # of a process that gave up
            make()
            made.touch()


@pytest.fixture(scope="session")
def anyio_backend() -> str:
    """What runs tests that are coroutines."""
    return "asyncio"


@pytest.fixture(scope="session", autouse=True)
def _few_threads() -> Iterator[None]:
    """Leave the thread count as the environment asks, but never above two."""
    before = torch.get_num_threads()
    torch.set_num_threads(min(2, before))
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def _forgets_methods(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have no test know the methods of another one's files."""
    monkeypatch.setattr(registry, "_found", {})


@pytest.fixture(autouse=True)
def _same_threads() -> Iterator[None]:
    """Undo what a benchmark sets for its process: sums are equal to the bit on as many threads."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def data_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_images(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="session")
def held_out() -> ImageSet:
    """The test images of `data_dir`."""
    images = sample_images("mnist")
    return ImageSet(
        images.name,
        images.classes,
        images.images[TRAINING_IMAGES:],
        images.labels[TRAINING_IMAGES:],
        images.source,
    )


@pytest.fixture(scope="session")
def recovery_run(data_dir: Path, shared: Path) -> stages.Run:
    """A finished tiny run of the recovery objective; tests must not write into its folder."""
    run = make_run(tiny_settings("recovery"), shared / "recovery", data_dir)

    def train() -> None:
        stages.train(run)
        stages.fuse(run, 4)

    once(shared / "recovery", train)
    return run


@pytest.fixture(scope="session")
def bundle_folder(recovery_run: stages.Run) -> Path:
    return recovery_run.fusion_folder(4) / "bundle"


@pytest.fixture
def bfloat16_instructions(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have bfloat16 computed wherever it is requested, on any processor."""
    monkeypatch.setattr(precision, "computes_bfloat16", lambda _: True)


@pytest.fixture
def bundle(bundle_folder: Path) -> Bundle:
    return load_bundle(bundle_folder)


@pytest.fixture
def call(capsys: pytest.CaptureFixture[str]) -> Command:
    """Run `codedinvnet` in this process."""
    return _caller(main, capsys)


@pytest.fixture
def call_paper(capsys: pytest.CaptureFixture[str]) -> Command:
    """Run `main.py` in this process."""
    return _caller(paper_main, capsys)


@pytest.fixture
def call_benchmarks(capsys: pytest.CaptureFixture[str]) -> Command:
    """Run `python -m benchmarks` in this process."""
    return _caller(benchmarks.command_line.main, capsys)


def _caller(
    entry: Callable[[list[str]], int], capsys: pytest.CaptureFixture[str]
) -> Callable[..., Outcome]:
    def run(*words: str | os.PathLike[str]) -> Outcome:
        capsys.readouterr()
        try:
            code = entry([os.fspath(word) for word in words])
        except SystemExit as stop:  # argparse: --help and wrong usage
            code = stop.code if isinstance(stop.code, int) else 1
        captured = capsys.readouterr()
        return Outcome(code, captured.out, captured.err)

    return run
