"""What the fork server loads; each test in an interpreter of its own, whose fork server is new."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from codedinvnet.models import open_model
from codedinvnet.serving.workers import preload
from codedinvnet.serving.workers.computing import (
    BundleSpec,
    ModelComputer,
    ModelSpec,
    SchemeComputer,
)
from tests.models.factories import PLACE
from tests.processes import needs_proc

SCRIPT = """
import asyncio, sys
from codedinvnet.errors import UserError
from codedinvnet.serving.workers.computing import BundleSpec, ModelComputer, ModelSpec
from codedinvnet.serving.workers.computing import SchemeComputer
from codedinvnet.serving.workers.local import ProcessPool

def shared(pid):
    lines = open(f"/proc/{pid}/smaps_rollup").read().splitlines()[1:]
    found = {line.split(":")[0]: int(line.split()[1]) for line in lines}
    return 1 - found["Pss"] / found["Rss"]

async def main():
    pool = ProcessPool(BundleSpec(sys.argv[1], 4, threads=int(sys.argv[2])))
    try:
        await pool.start(4)
        print(min(shared(pool.pid(worker)) for worker in range(4)))
    except UserError as error:
        print("refused:", error)
    finally:
        await pool.stop()

if __name__ == "__main__":
    asyncio.run(main())
"""

EXAMPLE = Path(__file__).resolve().parents[3] / "examples" / "my_method.py"
ASKING = """
import asyncio, sys
import numpy as np
from codedinvnet.errors import UserError
from codedinvnet.serving.workers.computing import BundleSpec, ModelSpec
from codedinvnet.models.source import ModelSource
from codedinvnet.serving.workers.local import ProcessPool
from codedinvnet.serving.workers.pool import Task

async def main():
    kind, place, threads = sys.argv[1:]
    if kind == "factory":
        spec = ModelSpec(ModelSource(place, threads=int(threads)))
        array = np.zeros((1, 3, 64, 64), np.float32)
    else:
        spec = BundleSpec("mnist", 2, threads=int(threads), method=place)
        array = np.zeros((1, 1, 28, 28), np.uint8)
    pool = ProcessPool(spec)
    try:
        await pool.start(1)
        call = pool.call(0, Task(1, 0, {"x": array}))
        (found,) = (await asyncio.wait_for(call, 20)).outputs.values()
        print("answered", len(found))
    except UserError as error:
        print("refused:", error)
    finally:
        await pool.stop()

if __name__ == "__main__":
    asyncio.run(main())
"""


def run(tmp_path: Path, *words: str, code: str = SCRIPT) -> str:
    script = tmp_path / "script.py"
    script.write_text(code)
    done = subprocess.run(
        [sys.executable, str(script), *words], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@needs_proc
def test_workers_share_what_the_fork_server_has_loaded(tmp_path: Path) -> None:
    together = float(run(tmp_path, "mnist", "1"))
    apart = float(run(tmp_path, "mnist", "2"))  # several threads: each loads for itself
    assert together > apart + 0.05
    assert together > 0.6


def test_what_cannot_be_loaded_is_refused_by_the_workers(tmp_path: Path) -> None:
    assert run(tmp_path, str(tmp_path / "nowhere"), "1").startswith("refused: worker")


NETWORK = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Conv2d(3, 64, 3, padding=1)

    def forward(self, x):
        {forward}
        return self.layer(x).mean((2, 3))

{top}

def make():
    {function}
    return Net(), torch.zeros(1, 3, 64, 64)
"""
SET = "torch.set_num_threads(2)"


@pytest.mark.parametrize("where", ["top", "function"])
def test_a_factory_that_sets_pytorchs_threads_is_answered_for(where: str, tmp_path: Path) -> None:
    """Two threads in the fork server would be a pool that no worker has."""
    path = tmp_path / "net.py"
    path.write_text(NETWORK.format(**{"top": "", "forward": "", "function": "", where: SET}))
    assert run(tmp_path, "factory", f"{path}:make", "1", code=ASKING) == "answered 1"


def test_a_method_whose_file_sets_pytorchs_threads_is_answered_for(tmp_path: Path) -> None:
    path = tmp_path / "method.py"
    path.write_text(f"{EXAMPLE.read_text()}\nimport torch\n{SET}\n")
    assert run(tmp_path, "method", f"{path}:TwoParities", "1", code=ASKING) == "answered 1"


def test_a_model_that_sets_pytorchs_threads_when_it_computes(tmp_path: Path) -> None:
    path = tmp_path / "net.py"
    path.write_text(NETWORK.format(top="", function="", forward=SET))
    told = run(tmp_path, "factory", f"{path}:make", "1", code=ASKING)
    assert told.startswith("refused: worker 0 cannot start")
    assert "--threads-per-worker 2" in told
    assert run(tmp_path, "factory", f"{path}:make", "2", code=ASKING) == "answered 1"


def test_another_spec_is_loaded_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    spec = BundleSpec("mnist", 4)
    method = object()
    monkeypatch.setattr(preload, "_loaded", (preload._key(spec), method, 1))
    assert preload.load(spec) is method
    assert preload.load(BundleSpec(Path("mnist"), 4)) is method
    other = preload.load(BundleSpec("mnist", 5))
    assert isinstance(other, SchemeComputer)
    assert other.scheme.rules.k == 5


def test_the_environment_is_left_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str | None] = []
    monkeypatch.setattr(
        "multiprocessing.forkserver.ensure_running",
        lambda: seen.append(os.environ.get(preload.VARIABLE)),
    )
    plain = BundleSpec("mnist", 4)
    for spec in (plain, BundleSpec("mnist", 4, "cuda"), BundleSpec("mnist", 4, threads=2)):
        preload.start_fork_server(spec)
    assert [value is not None for value in seen] == [True, False, False]
    assert preload.VARIABLE not in os.environ
    monkeypatch.setenv(preload.VARIABLE, str(seen[0]))
    found = preload._load_named()
    assert found is not None
    assert found[0] == preload._key(plain)
    assert isinstance(found[1], SchemeComputer)
    assert found[1].scheme.rules.k == 4


def test_a_model_of_ones_own_is_loaded_as_well(monkeypatch: pytest.MonkeyPatch) -> None:
    spec = ModelSpec(open_model(f"{PLACE}:mlp").source)
    monkeypatch.setenv(preload.VARIABLE, preload._key(spec))
    found = preload._load_named()
    assert found is not None
    monkeypatch.setattr(preload, "_loaded", found)
    assert isinstance(found[1], ModelComputer)
    assert preload.load(spec) is found[1]
