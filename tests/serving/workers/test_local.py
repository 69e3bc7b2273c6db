"""Real worker processes: they are killed, stopped and broken."""

from __future__ import annotations

import asyncio
import logging
import os
import shutil
import signal
from multiprocessing.util import get_temp_dir
from pathlib import Path

import numpy as np
import pytest

from codedinvnet.codes.build import scheme_for
from codedinvnet.common.errors import UserError
from codedinvnet.models import open_model
from codedinvnet.models.bundle import bundle_folder, load_bundle
from codedinvnet.serving.served import IMAGES
from codedinvnet.serving.workers import local as process_pool
from codedinvnet.serving.workers.computing import ModelSpec, SchemeComputer
from codedinvnet.serving.workers.local import ProcessPool
from codedinvnet.serving.workers.pool import Task, WorkerDied, WorkerFailed, run_task
from tests.models.factories import PLACE, faint, save_onnx
from tests.observing import until
from tests.processes import needs_proc, survivors
from tests.serving.bundles import output
from tests.serving.workers.worker_processes import (
    Unloadable,
    data_task,
    images,
    kill_in_mid_request,
    started,
)


async def test_outputs_are_those_of_the_method() -> None:
    computer = SchemeComputer(scheme_for(load_bundle("mnist"), 4))
    async with started(2) as (pool, pids):
        assert len(set(pids)) == 2
        whole = images(0, 1, 2)
        floats = (whole / 255).astype(np.float32)
        for number, batch in ((0, whole[:1]), (4, whole), (0, floats[:1]), (4, floats)):
            result = await pool.call(number % 2, Task(number + 1, number, {IMAGES: batch}))
            expected = output(run_task(computer, number, {IMAGES: batch}))
            np.testing.assert_allclose(output(result), expected, rtol=1e-5, atol=1e-5)
            assert output(result).dtype == np.float32
            assert output(result).flags.writeable
            assert 0 < result.seconds < 20
            assert result.held == 0
            if number == 4:
                assert 0 < result.encode_seconds < result.seconds
            else:
                assert result.encode_seconds == 0


async def test_a_killed_worker_is_noticed(caplog: pytest.LogCaptureFixture) -> None:
    async with started(2) as (pool, pids):
        deaths: list[tuple[int, str]] = []
        pool.on_death = lambda worker, reason: deaths.append((worker, reason))
        reason = await kill_in_mid_request(pool, pids[0])
        assert reason == "its process ended"
        assert deaths == [(0, reason)]
        assert pool.pid(0) is None
        with pytest.raises(WorkerDied):
            await pool.call(0, data_task(2, 0))
        await pool.call(1, data_task(3, 0))  # the others go on

        os.kill(pids[1], signal.SIGKILL)  # an idle one
        await until(lambda: len(deaths) == 2)
        assert deaths[1][0] == 1

        caplog.set_level(logging.WARNING, "codedinvnet.serving")
        for worker in range(2):  # at once, the start of one may take the other's exit code
            await pool.replace(worker)
        ends = [r.__dict__["fields"] for r in caplog.records if r.msg == "worker ended"]
        assert sorted(end["worker"] for end in ends) == [0, 1]
        assert {end["exit"] for end in ends} == {"SIGKILL"}
        assert {pool.pid(0), pool.pid(1)}.isdisjoint(pids)
        await asyncio.gather(*[pool.call(i, data_task(4 + i, 0)) for i in range(2)])
        assert len(deaths) == 2


@pytest.mark.parametrize("kind", ["module", "onnx"])
async def test_numbers_that_a_processor_is_slow_with_are_zero(kind: str, tmp_path: Path) -> None:
    module = kind == "module"
    place = f"{PLACE}:faint" if module else str(save_onnx(faint, tmp_path / "faint.onnx"))
    pool = ProcessPool(ModelSpec(open_model(place).source))
    await pool.start(1)
    try:
        x = np.array([[1e-30, 1e-20, -1e-30, 1]], np.float32)
        (found,) = (await pool.call(0, Task(1, 0, {"x": x}))).outputs.values()
    finally:
        await pool.stop()
    assert found == pytest.approx(np.array([[0, 1e-30, 0, 1e-10]]), rel=1e-6, abs=0)


async def test_a_task_that_raises_or_whose_reply_cannot_be_read_leaves_the_worker_ready(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fails(*_: object) -> None:
        raise MemoryError("no room")

    async with started(1) as (pool, pids):
        deaths: list[str] = []
        pool.on_death = lambda _, reason: deaths.append(reason)
        wrong = Task(3, 0, {IMAGES: np.zeros((1, 3, 7, 7), np.uint8)})
        with pytest.raises(WorkerFailed, match=r"^\w+Error: ."):
            await pool.call(0, wrong)
        with monkeypatch.context() as patch:  # of its content: the next one may be as ever
            patch.setattr(process_pool, "unpack", fails)
            with pytest.raises(MemoryError, match="no room"):
                await asyncio.wait_for(pool.call(0, data_task(1, 0)), 20)
        await pool.call(0, data_task(2, 0))
        assert pool.pid(0) == pids[0]
        assert deaths == []


@needs_proc
async def test_a_replacement_that_cannot_be_loaded_is_an_error(tmp_path: Path) -> None:
    shipped = bundle_folder("mnist")
    folder = tmp_path / "moved"
    shutil.copytree(shipped, folder)

    # Several threads: it would be forked from what the fork server has loaded.
    async with started(1, bundle=folder, threads=2) as (pool, pids):
        folder.rename(tmp_path / "away")
        with pytest.raises(UserError, match="no bundle"):
            await pool.replace(0)
        assert survivors(pids) == []
        (tmp_path / "away").rename(folder)
        await pool.replace(0)
        await pool.call(0, data_task(1, 0))


@needs_proc
@pytest.mark.parametrize("whole", [False, True], ids=["socket", "folder"])
async def test_a_fork_server_that_cannot_be_reached_is_replaced(whole: bool) -> None:
    """What cleans /tmp up removes its socket, and then the empty folder."""
    async with started(2) as (pool, pids):
        folder = Path(get_temp_dir())
        sockets = list(folder.iterdir())
        assert sockets
        for path in sockets:
            path.unlink()
        if whole:
            folder.rmdir()
        await asyncio.gather(pool.replace(0), pool.replace(1))
        assert {pool.pid(0), pool.pid(1)}.isdisjoint(pids)
        await asyncio.gather(*[pool.call(i, data_task(1 + i, 0)) for i in range(2)])
        os.kill(pool.pid(0) or 0, signal.SIGKILL)
        await pool.replace(0)  # by the new one
    folder.mkdir(exist_ok=True)  # multiprocessing removes it in the end


@pytest.mark.parametrize(("kind", "error"), [("memory", WorkerDied), ("mistake", UserError)])
async def test_only_a_users_mistake_is_one(
    kind: str, error: type[Exception], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The end of the worker before is logged once, however often the next one does not start."""
    reason = tmp_path / "reason"
    spec = Unloadable("mnist", 4, part=reason)
    reason.write_text(kind)
    with pytest.raises(UserError, match=r"^worker 0 cannot start: \w+Error: no room"):
        await ProcessPool(spec).start(1)
    reason.unlink()
    pool = ProcessPool(spec)
    await pool.start(1)
    try:
        reason.write_text(kind)
        os.kill(pool.pid(0) or 0, signal.SIGKILL)
        await until(lambda: pool.connections[0].dead != "")
        for _ in range(2):
            with pytest.raises(error, match="no room"):
                await pool.replace(0)
        reason.unlink()
        await pool.replace(0)
        ends = [r for r in caplog.records if r.msg == "worker ended"]
        assert [end.__dict__["fields"]["exit"] for end in ends] == ["SIGKILL"]
        caplog.clear()
        reason.write_text(kind)
        for _ in range(2):  # which ends one that is well
            with pytest.raises(error, match="no room"):
                await pool.replace(0)
        assert "worker ended" not in caplog.messages
    finally:
        await asyncio.wait_for(pool.stop(), 20)
