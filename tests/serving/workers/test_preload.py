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


def run(tmp_path: Path, *words: str) -> str:
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
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


def test_another_spec_is_loaded_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    spec = BundleSpec("mnist", 4)
    method = object()
    monkeypatch.setattr(preload, "_loaded", (preload._key(spec), method))
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
