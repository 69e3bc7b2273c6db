"""What the fork server loads; each test of workers has a fork server of its own."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from codedinvnet.common.errors import UserError
from codedinvnet.models.source import ModelSource
from codedinvnet.serving.workers.computing import BundleSpec, ModelSpec, WorkerSpec
from codedinvnet.serving.workers.local import ProcessPool
from codedinvnet.serving.workers.pool import Task
from tests.processes import needs_proc
from tests.serving.workers.worker_processes import end_fork_server

EXAMPLE = Path(__file__).resolve().parents[3] / "examples" / "my_method.py"


@pytest.fixture(autouse=True)
def _no_fork_server_stays() -> Iterator[None]:
    """Have no later test meet a fork server in which a model has set PyTorch's threads."""
    yield
    end_fork_server()


def shared(pid: int | None) -> float:
    """Return the share of a process's memory that others have as well."""
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()[1:]
    found = {line.split(":")[0]: int(line.split()[1]) for line in lines}
    return 1 - found["Pss"] / found["Rss"]


async def least_shared(threads: int) -> float:
    """Return what four workers of a new fork server share at least."""
    end_fork_server()
    pool = ProcessPool(BundleSpec("mnist", 4, threads=threads))
    await pool.start(4)
    try:
        return min(shared(pool.pid(worker)) for worker in range(4))
    finally:
        await pool.stop()


async def answered(spec: WorkerSpec, array: np.ndarray) -> int:
    """Return how many rows a worker of a new fork server answers with."""
    end_fork_server()
    pool = ProcessPool(spec)
    await pool.start(1)
    try:
        call = pool.call(0, Task(1, 0, {"x": array}))
        outputs = (await asyncio.wait_for(call, 20)).outputs
        (rows,) = {len(output) for output in outputs.values()}
        return rows
    finally:
        await pool.stop()


@needs_proc
async def test_workers_share_what_the_fork_server_has_loaded() -> None:
    together = await least_shared(1)
    apart = await least_shared(2)  # several threads: each loads for itself
    assert together > apart + 0.05
    assert together > 0.6


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


IMAGE = np.zeros((1, 3, 64, 64), np.float32)


@pytest.mark.parametrize("where", ["top", "function", "method"])
async def test_a_file_that_sets_pytorchs_threads_is_answered_for(
    where: str, tmp_path: Path
) -> None:
    """Two threads in the fork server would be a pool that no worker has."""
    path = tmp_path / "net.py"
    if where == "method":
        path.write_text(f"{EXAMPLE.read_text()}\nimport torch\n{SET}\n")
        spec = BundleSpec("mnist", 2, threads=1, method=f"{path}:TwoParities")
        assert await answered(spec, np.zeros((1, 1, 28, 28), np.uint8)) == 1
        return
    path.write_text(NETWORK.format(**{"top": "", "forward": "", "function": "", where: SET}))
    assert await answered(ModelSpec(ModelSource(f"{path}:make", threads=1)), IMAGE) == 1


async def test_a_model_that_sets_pytorchs_threads_when_it_computes(tmp_path: Path) -> None:
    path = tmp_path / "net.py"
    path.write_text(NETWORK.format(top="", function="", forward=SET))
    told = "^worker 0 cannot start.*--set threads-per-worker=2"
    with pytest.raises(UserError, match=told):
        await answered(ModelSpec(ModelSource(f"{path}:make", threads=1)), IMAGE)
    assert await answered(ModelSpec(ModelSource(f"{path}:make", threads=2)), IMAGE) == 1
