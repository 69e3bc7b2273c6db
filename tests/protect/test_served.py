"""Protected models behind a service, one of whose workers holds its answers back."""

from __future__ import annotations

import asyncio
import re
import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch

from codedinvnet.errors import UserError
from codedinvnet.models import open_model
from codedinvnet.protect.calibration import protection_calibration
from codedinvnet.protect.folder import WEIGHTS, load_part
from codedinvnet.protocol.messages import InferRequest
from codedinvnet.serving.app import open_app
from codedinvnet.serving.checks import check
from codedinvnet.serving.config import ServeOptions
from codedinvnet.serving.workers.faults import Delay, Fault, FaultyPool, Schedule
from codedinvnet.serving.workers.pool import Task, WorkerPool
from codedinvnet.serving.workers.result import Result
from codedinvnet.trust.calibration import DECODED, FILE, GUESSED
from tests.conftest import Command
from tests.protect.conftest import COUNT, PLACE, arguments
from tests.protect.factories import FEATURES

POOL = "examples/my_pool.py:Pool"


LATE = 1
"""The late worker, and its member."""
HELD = Fault(kind="hold", worker=LATE, delay=Delay(ms=2000))


class ExtraLast(FaultyPool):
    """Its extra tasks end after all data tasks but the late worker's, however slow these are.

    Args:
        pool: what computes.
        members: how many a group has.
    """

    def __init__(self, pool: WorkerPool, members: int) -> None:
        super().__init__(pool, Schedule())
        self.members, self.left = members, members - 1
        self.answered = asyncio.Event()

    async def call(self, worker: int, task: Task) -> Result:
        result = await super().call(worker, task)
        if task.number >= self.members:
            await self.answered.wait()
        elif worker != LATE:
            self.left -= 1
            if not self.left:
                self.answered.set()
        return result


def answers(
    options: ServeOptions, inputs: Mapping[str, np.ndarray], fault: Fault = HELD
) -> Mapping[str, np.ndarray]:
    """Return the outputs of a service for one full group whose second member is late."""
    check(options)

    async def ask() -> Mapping[str, np.ndarray]:
        app = open_app(options)
        faulty = cast(FaultyPool, app.dispatcher.pool)
        faulty.pool = ExtraLast(faulty.pool, len(next(iter(inputs.values()))))
        await app.dispatcher.start()
        try:
            faulty.add(fault)
            request = InferRequest(inputs)
            return (await app.service.answer(request, time.monotonic())).message.outputs
        finally:
            await app.dispatcher.stop()

    return asyncio.run(ask())


def test_a_late_answer_is_the_small_backups(finished: Path) -> None:
    source = f"{PLACE}:vectors"
    options = ServeOptions(
        source=source, protection=finished, method="small-backup", pool=POOL, demo=True
    )
    x = np.random.default_rng(3).random((4, FEATURES), np.float32)
    found = answers(options, {"x": x})
    assert found["outcome"].tolist() == [b"direct", b"decoded", b"direct", b"direct"]
    model, student = open_model(source), load_part(finished / WEIGHTS)
    for i in (0, 2, 3):
        assert found["output"][i].tobytes() == model.run({"x": x[i : i + 1]})["output"].tobytes()
    with torch.inference_mode():
        wanted = student(torch.from_numpy(x))[1]
    assert found["output"][1] == pytest.approx(wanted.numpy(), abs=1e-4)


def test_a_dear_backup_is_shared_by_workers(finished: Path) -> None:
    source = f"{PLACE}:vectors"
    options = ServeOptions(
        source=source, protection=finished, method="own-backup", pool=POOL, demo=True
    )
    x = np.random.default_rng(3).random((4, FEATURES), np.float32)
    found = answers(options, {"x": x})
    assert found["outcome"].tolist() == [b"direct", b"decoded", b"direct", b"direct"]
    own = open_model(f"{PLACE}:smaller").run({"x": x[1:2]})["output"]
    assert found["output"][1:2] == pytest.approx(own, abs=1e-4)


@pytest.mark.parametrize(
    ("protected", "more", "told", "share"),
    [
        (True, {}, ", k = 4", 1 / 4),
        (False, {"policy": "hedge"}, "", 1 / 10),
        (False, {"policy": "hedge", "k": 5}, "", 1 / 5),
        (False, {"method": "nercc", "k": 3, "policy": "coded"}, ", k = 3", 1 / 3),
    ],
)
def test_the_size_of_a_group_is_that_of_the_code(
    protected: bool, more: dict[str, Any], told: str, share: float, finished: Path
) -> None:
    more = {"method": "small-backup", "protection": finished} if protected else more
    options = ServeOptions(source=f"{PLACE}:vectors", workers=7, pool=POOL, port=0, **more)
    app = open_app(options)
    assert app.choices.size == (int(told.rpartition(" ")[2]) if told else 1)
    assert app.dispatcher.rules.hedge_share == share


@pytest.mark.usefixtures("exported")
def test_a_model_of_several_inputs_is_protected(call: Command, tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    numbers = generator.random((COUNT, 5), np.float32)
    flags = generator.random((COUNT, 3)) < 0.5
    np.savez(tmp_path / "x.npz", numbers=numbers, flags=flags)
    more = ("--methods", "small-backup")
    outcome = call(*arguments("two_inputs", tmp_path / "x.npz", tmp_path / "out", *more))
    assert outcome.code == 0, outcome.err
    options = ServeOptions(
        source=f"{PLACE}:two_inputs",
        protection=tmp_path / "out",
        method="small-backup",
        pool=POOL,
        demo=True,
    )
    found = answers(options, {"flags": flags[:4], "numbers": numbers[:4]})
    assert found["outcome"].tolist() == [b"direct", b"decoded", b"direct", b"direct"]
    student = load_part(tmp_path / "out" / WEIGHTS)
    with torch.inference_mode():
        wanted = student(torch.from_numpy(numbers[:4]), torch.from_numpy(flags[:4]))[1]
    assert found["output"][1] == pytest.approx(wanted.numpy(), abs=1e-4)


def test_a_protection_releases_what_keeps_the_limit(finished: Path) -> None:
    source, x = f"{PLACE}:vectors", np.random.default_rng(3).random((4, FEATURES), np.float32)
    more: dict[str, Any] = {"method": "small-backup", "pool": POOL, "demo": True}
    stored = protection_calibration(finished)
    curve = stored.curve("small-backup", 4)
    assert curve is not None
    told = {}
    for limit in (0.999, 1e-9):
        options = ServeOptions(source=source, protection=finished, max_disagreement=limit, **more)
        reliance = open_app(options).dispatcher.gate
        assert reliance is not None
        assert reliance.thresholds[limit, 4, DECODED] == curve.threshold(limit)
        told[limit] = answers(options, {"x": x})["outcome"].tolist().count(b"decoded")
    assert told == {0.999: 1, 1e-9: 0}


def test_a_codes_guesses_go_by_what_side_features_alone_answered(finished: Path) -> None:
    """So they are released under a limit, and workers that answer wrongly are noticed."""
    stored = protection_calibration(finished)
    side = stored.curve("code-side", 4)
    assert side is not None
    options = ServeOptions(source=f"{PLACE}:vectors", protection=finished, pool=POOL, demo=True)
    for method in ("code", "code-side"):
        kept = options.model_copy(
            update={"method": method, "max_disagreement": 0.999, "on_corruption": "replace"}
        )
        reliance = open_app(kept).dispatcher.gate
        assert reliance is not None
        assert reliance.thresholds[0.999, 4, GUESSED] == side.threshold(0.999) < 1
    assert stored.curve("code-scores", 4, GUESSED) is None


def test_a_protection_without_calibration_keeps_no_limit(finished: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(finished, tmp_path / "old")
    (folder / FILE).unlink()
    options = ServeOptions(
        source=f"{PLACE}:vectors", protection=folder, method="small-backup", pool=POOL, demo=True
    )
    assert open_app(options).dispatcher.gate is None
    with pytest.raises(UserError, match="codedinvnet protect"):
        open_app(options.model_copy(update={"max_disagreement": 0.01}))


@pytest.mark.parametrize(
    ("source", "more", "told"),
    [
        (f"{PLACE}:images", {}, "protects tests.protect.factories:vectors with digest"),
        (f"{PLACE}:vectors", {"method": "oracle"}, "no method 'oracle'"),
        (f"{PLACE}:vectors", {"policy": "hedge"}, "--protection: goes with a coded policy"),
        ("mnist", {}, "--protection: is for a model of your own"),
        (
            f"{PLACE}:vectors",
            {"method": "own-backup", "on_corruption": "replace"},
            "--on-corruption replace: wrong workers are not noticed: groups of own-backup have",
        ),
        (
            f"{PLACE}:vectors",
            {"method": "nercc", "on_corruption": "replace"},
            "--on-corruption replace: wrong workers are not noticed: no calibration says",
        ),
        (
            f"{PLACE}:vectors",
            {"method": "nercc", "max_disagreement": 0.1},
            "--max-disagreement: nercc has no direct answers, so that nothing stands in",
        ),
        (f"{PLACE}:vectors", {"k": 4}, "--k: goes without --protection, which has its own"),
    ],
)
def test_what_a_protection_does_not_go_with(
    source: str, more: dict[str, Any], told: str, finished: Path
) -> None:
    with pytest.raises(UserError, match=re.escape(told)):
        answers(ServeOptions(source=source, protection=finished, pool=POOL, **more), {})
