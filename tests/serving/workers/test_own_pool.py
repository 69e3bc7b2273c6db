"""Pools of users' own: what is wrong with one is told, and the service goes on."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from codedinvnet.errors import UserError
from codedinvnet.net.logs import logger
from codedinvnet.protocol.messages import InferRequest
from codedinvnet.serving.app import open_app
from codedinvnet.serving.checks import check
from codedinvnet.serving.config import ServeOptions
from tests.models.factories import PLACE

EXAMPLE = Path("examples/my_pool.py").resolve()


def written(folder: Path, text: str) -> str:
    path = folder / "mine.py"
    path.write_text(text, encoding="utf-8")
    return f"{path}:Mine"


def options(pool: str) -> ServeOptions:
    return ServeOptions(source=f"{PLACE}:mlp", workers=2, policy="uncoded", pool=pool)


async def test_a_pool_that_raises_is_told_and_the_service_goes_on(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logger, "propagate", True)
    text = f"""
import sys
sys.path.insert(0, {str(EXAMPLE.parent)!r})
from my_pool import Pool

class Mine(Pool):
    async def call(self, worker, task):
        if worker == 0:
            raise ValueError("my own mistake")
        return await super().call(worker, task)
"""
    app = open_app(options(written(tmp_path, text)))
    inputs = {"input": np.random.default_rng(0).random((6, 16), np.float32)}

    await app.dispatcher.start()
    try:
        response = await app.service.answer(InferRequest(inputs), time.monotonic())
        assert set(response.message.outputs["outcome"]) == {b"direct"}
    finally:
        await app.dispatcher.stop()
    (told, *_) = [record for record in caplog.records if record.message == "the pool raised"]
    assert told.exc_info is not None
    assert str(told.exc_info[1]) == "my own mistake"
    assert told.__dict__["fields"]["pool"] == "Mine"


def test_the_examples_process_ends_though_a_thread_hangs() -> None:
    text = """
import asyncio, threading
from codedinvnet.serving.workers.pool import Task
from examples.my_pool import Pool

class Hanging:
    def __init__(self):
        self.is_at_it = threading.Event()
    def load(self):
        return self
    def compute(self, number, inputs):
        if number == 0:
            self.is_at_it.set()
            threading.Event().wait()
        return {}, 0.0

async def main():
    spec = Hanging()
    pool = Pool(spec)
    await pool.start(1)
    lost = asyncio.ensure_future(pool.call(0, Task(0, 0, {})))
    assert await asyncio.to_thread(spec.is_at_it.wait, 20)
    lost.cancel()
    await pool.replace(0)
    print((await pool.call(0, Task(1, 1, {}))).outputs)
    await pool.stop()

asyncio.run(main())
"""
    command = [sys.executable, "-c", text]
    found = subprocess.run(
        command, cwd=EXAMPLE.parents[1], capture_output=True, timeout=60, check=True
    )
    assert found.stdout.strip() == b"{}"


def test_a_pool_that_cannot_be_made_shows_its_own_traceback(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = """
class Mine:
    def __init__(self, spec):
        raise OSError("my cluster is down")
    start = call = replace = stop = pid = print
"""
    place = written(tmp_path, text)
    with pytest.raises(UserError, match=r"Mine of .*mine\.py raised OSError: my cluster is down"):
        open_app(options(place))
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == f"the pool Mine of {place.rpartition(':')[0]} raised:"
    assert any("mine.py" in line for line in lines)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "--pool: {place} has no class Mine"),
        (
            "class Mine:\n    start = stop = print",
            "--pool: Mine of {place} lacks call, replace, pid",
        ),
    ],
)
def test_a_class_that_is_no_pool(text: str, message: str, tmp_path: Path) -> None:
    place = written(tmp_path, text)
    with pytest.raises(UserError) as caught:
        open_app(options(place))
    assert str(caught.value) == message.format(place=place.rpartition(":")[0])


def test_a_pool_that_is_nowhere(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"--pool: 'slurm' is not local, ray or FILE.py:CLASS"):
        check(options("slurm"))
    with pytest.raises(UserError, match=r"--pool: there is no file .*nowhere\.py"):
        open_app(options(f"{tmp_path}/nowhere.py:Mine"))
