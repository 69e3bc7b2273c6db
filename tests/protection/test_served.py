"""Protected models behind a service, one of whose workers holds its answers back."""

from __future__ import annotations

import asyncio
import json
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import tritonclient.grpc.aio as rpc
import tritonclient.http.aio as http
from tritonclient.utils import InferenceServerException

import codedinvnet
from codedinvnet.cli import main
from codedinvnet.common.distributions import Distribution
from codedinvnet.common.errors import UserError
from codedinvnet.common.faults import Fault
from codedinvnet.models import open_model
from codedinvnet.net.listening import free_port
from codedinvnet.net.protocol.messages import InferRequest
from codedinvnet.protection import distil, students
from codedinvnet.protection.calibration import DECODED
from codedinvnet.protection.folder import DESCRIPTION, load_protection, protection_calibration
from codedinvnet.protection.measure import LIMITS
from codedinvnet.serving.answers import InputRefused
from codedinvnet.serving.app import open_app, running
from codedinvnet.serving.config import ServeOptions
from codedinvnet.serving.opened import check
from codedinvnet.serving.workers.faults import FaultyPool, Schedule
from codedinvnet.serving.workers.pool import Result, Task, WorkerPool
from tests.conftest import Command
from tests.models.factories import endless_onnx
from tests.observing import counted
from tests.protection.conftest import COUNT, MADE, PLACE, arguments, description, queries
from tests.protection.factories import FEATURES

POOL = "examples/my_pool.py:Pool"
LATE = 1
"""The late worker, and its member."""
EVERYTHING = 0.999
"""A limit that releases every answer."""
HELD = Fault(kind="hold", worker=LATE, delay=Distribution(ms=2000))


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
    options: ServeOptions, inputs: Mapping[str, np.ndarray], fault: Fault | None = HELD
) -> Mapping[str, np.ndarray]:
    """Return the outputs of a service for one full group whose second member may be late."""
    check(options)

    async def ask() -> Mapping[str, np.ndarray]:
        app = open_app(options)
        faulty = cast(FaultyPool, app.dispatcher.pool)
        if fault is not None:
            faulty.pool = ExtraLast(faulty.pool, len(next(iter(inputs.values()))))
        await app.dispatcher.start()
        try:
            if fault is not None:
                faulty.add(fault)
            request = InferRequest(inputs)
            return (await app.service.answer(request, time.monotonic())).message.outputs
        finally:
            await app.dispatcher.stop()

    return asyncio.run(ask())


def served(folder: Path, **more: Any) -> ServeOptions:
    """Return how a protected model is served."""
    settings: dict[str, Any] = {"source": f"{PLACE}:vectors", "pool": POOL, "demo": True}
    settings |= {"max_disagreement": EVERYTHING, **more}
    return ServeOptions(protection=folder, **settings)


@pytest.mark.parametrize("named", [True, False])
def test_a_late_answer_is_the_backups_and_all_others_are_the_models(
    named: bool, finished: Path
) -> None:
    x = np.random.default_rng(3).random((4, FEATURES), np.float32)
    model, name = open_model(f"{PLACE}:vectors"), description(finished)["recommended"]
    found = answers(served(finished, method=name if named else "small-backup"), {"x": x})
    assert found["outcome"].tolist() == [b"direct", b"decoded", b"direct", b"direct"]
    for i in (0, 2, 3):
        assert found["output"][i].tobytes() == model.run({"x": x[i : i + 1]})["output"].tobytes()
    backup = open_model(finished / f"{name}.onnx").run({"x": x[1:2]})["output"]
    assert found["output"][1:2] == pytest.approx(backup, abs=1e-4)


def test_a_protection_answers_in_process_by_its_limit(finished: Path) -> None:
    found, x = description(finished), np.random.default_rng(3).random((500, FEATURES), np.float32)
    answered = codedinvnet.open_protection(finished).answer({"x": x})
    backup = open_model(finished / f"{found['recommended']}.onnx").run({"x": x})
    np.testing.assert_array_equal(answered.values, backup["output"])
    model = open_model(f"{PLACE}:vectors").run({"x": x})["output"]
    agrees = answered.values.argmax(1) == model.argmax(1)
    assert agrees[answered.released].mean() >= 1 - 2 * found["limit"]
    assert 0.5 < answered.released.mean() < 1
    assert answered.agreement.mean() == pytest.approx(agrees.mean(), abs=0.05)
    strict = codedinvnet.open_protection(finished, limit=1e-9).answer({"x": x})
    assert not strict.released.any()


def test_a_protection_is_described(finished: Path, call: Command) -> None:
    found = description(finished)
    told = call("info", str(finished))
    assert told.code == 0
    assert f"| {found['table'][0]['method']} |" in told.out
    assert f"recommended: {found['recommended']}, with --max-disagreement" in told.out
    assert json.loads(call("info", str(finished), "--json").out) == found


def test_no_folder_changes_direct_answers(finished: Path, tmp_path: Path) -> None:
    """Whatever its description says, an answer that is not late is the model's, bit for bit."""
    folder = shutil.copytree(finished, tmp_path / "changed")
    found = description(folder)
    found["recommended"] = found["table"][0]["method"]
    found["table"][0].update(work=0.4, k=2, backup_workers=1)
    found["methods"] = found["codes"] = ["nercc"]
    (folder / DESCRIPTION).write_text(json.dumps(found))
    x = np.random.default_rng(4).random((40, FEATURES), np.float32)
    model = open_model(f"{PLACE}:vectors")
    for each in (finished, folder):
        outputs = answers(served(each, policy="auto"), {"x": x}, None)
        direct = outputs["outcome"] == b"direct"
        assert direct.mean() > 0.5
        for i in np.flatnonzero(direct):
            wanted = model.run({"x": x[i : i + 1]})["output"]
            assert outputs["output"][i].tobytes() == wanted.tobytes()


def test_a_model_of_several_inputs_is_protected(call: Command, tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    numbers = generator.random((COUNT, 5), np.float32)
    flags = generator.random((COUNT, 3)) < 0.5
    np.savez(tmp_path / "x.npz", numbers=numbers, flags=flags)
    out = tmp_path / "out"
    outcome = call(*arguments("two_inputs", tmp_path / "x.npz", out))
    assert outcome.code in MADE, outcome.err
    name = description(out)["table"][0]["method"]
    options = served(out, method=name, source=f"{PLACE}:two_inputs")
    found = answers(options, {"flags": flags[:4], "numbers": numbers[:4]})
    assert found["outcome"].tolist() == [b"direct", b"decoded", b"direct", b"direct"]
    late = {"numbers": numbers[1:2], "flags": flags[1:2]}
    wanted = open_model(out / f"{name}.onnx").run(late)["output"]
    assert found["output"][1:2] == pytest.approx(wanted, abs=1e-4)


def test_what_a_mask_hides_changes_no_backups_answer(call: Command, tmp_path: Path) -> None:
    generator, out = np.random.default_rng(0), tmp_path / "out"
    ids, kinds = generator.integers(0, 9, (COUNT, 20)), generator.integers(0, 2, (COUNT, 20))
    mask = (np.arange(20) < generator.integers(1, 21, (COUNT, 1))).astype(np.int64)
    np.savez(tmp_path / "x.npz", ids=ids, mask=mask, kinds=kinds)
    outcome = call(*arguments("masked", tmp_path / "x.npz", out))
    assert outcome.code in MADE, outcome.err
    backup = open_model(out / f"{description(out)['table'][0]['method']}.onnx")
    hidden = backup.run({"ids": np.where(mask, ids, 8), "mask": mask, "kinds": kinds * mask})
    for name, found in backup.run({"ids": ids, "mask": mask, "kinds": kinds}).items():
        np.testing.assert_allclose(found, hidden[name], atol=1e-5)


@pytest.mark.parametrize(
    ("model", "task"),
    [
        ("three_numbers", ("regress", "--tolerance", "20%")),
        ("raw_embedding", ("embed", "--cosine", "0.8")),
        ("tags", ("labels",)),
    ],
)
def test_late_answers_of_any_task_are_in_the_models_own_terms(
    model: str, task: tuple[str, ...], call: Command, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    words = arguments(model, queries(tmp_path), out, "--task", *task)
    outcome = call(*words)
    assert outcome.code in MADE, outcome.err
    row = description(out)["table"][0]
    served_model, x = open_model(f"{PLACE}:{model}"), np.load(tmp_path / "x.npy")[:4]
    found = answers(served(out, method=row["method"], source=f"{PLACE}:{model}"), {"x": x})
    assert found["outcome"].tolist() == [b"direct", b"decoded", b"direct", b"direct"]
    backup = open_model(out / f"{row['method']}.onnx").run({"x": x[1:2]})["output"]
    assert found["output"][1:2] == pytest.approx(backup, rel=1e-4, abs=1e-4)
    wanted = served_model.run({"x": x})["output"]
    assert found["output"].shape == wanted.shape
    assert np.corrcoef(found["output"].ravel(), wanted.ravel())[0, 1] > 0.5


def test_a_protection_releases_what_keeps_the_limit(finished: Path) -> None:
    x = np.random.default_rng(3).random((4, FEATURES), np.float32)
    curve = protection_calibration(finished).curve(description(finished)["recommended"], 4)
    assert curve is not None
    counts = {}
    for limit in (EVERYTHING, 1e-9):
        options = served(finished, method="small-backup", max_disagreement=limit)
        reliance = open_app(options).dispatcher.gate
        assert reliance is not None
        assert reliance.thresholds[limit, 4, DECODED] == curve.threshold(limit)
        counts[limit] = answers(options, {"x": x})["outcome"].tolist().count(b"decoded")
    assert counts == {EVERYTHING: 1, 1e-9: 0}


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A protection of `averaged`."""
    folder = tmp_path_factory.mktemp("texts")
    np.save(folder / "x.npy", np.random.default_rng(0).integers(0, 8, (COUNT, 20)))
    with pytest.MonkeyPatch.context() as changed:
        changed.setattr(distil, "MOST_ROUNDS", 3)
        changed.setattr(students, "WIDTHS", (4,))
        command = arguments("averaged", folder / "x.npy", folder / "out")
        assert main([*command, "--minutes", "1"]) in MADE
    return folder / "out"


@pytest.mark.parametrize(
    ("ids", "why"),
    [(99, "IndexError: index out of range"), (8, "ValueError: the model answers NaN")],
)
@pytest.mark.parametrize("policy", ["auto", "coded"])
def test_an_input_that_the_model_fails_on_is_refused_after_one_try(
    ids: int, why: str, policy: str, texts: Path
) -> None:
    """It gets no approximate answer, which the backup would give for any numbers."""
    method = description(texts)["table"][0]["method"]
    options = served(texts, source=f"{PLACE}:averaged", policy=policy, method=method)
    wrong, right = np.full((1, 20), ids), np.arange(20)[None] % 8

    async def ask() -> None:
        app = open_app(options)
        await app.dispatcher.start()
        try:
            for _ in range(3):
                before = counted(app.dispatcher.metrics.tasks.labels("data"))
                with pytest.raises(InputRefused, match=why):
                    await app.service.answer(InferRequest({"ids": wrong}), time.monotonic())
                after = counted(app.dispatcher.metrics.tasks.labels("data"))
                assert after == before + 1
                found = await app.service.answer(InferRequest({"ids": right}), time.monotonic())
                assert found.message.outputs["output"].shape == (1, 3)
            assert app.dispatcher.scheduler.workers_up == app.dispatcher.rules.workers
        finally:
            await app.dispatcher.stop()

    asyncio.run(ask())


@pytest.mark.parametrize("ids", [99, 8])
async def test_a_wrong_input_is_refused_over_grpc_as_over_http(ids: int, texts: Path) -> None:
    """Each of two clients gets the model's reason, and no approximate answer."""
    method, port = description(texts)["table"][0]["method"], free_port()
    options = served(
        texts, source=f"{PLACE}:averaged", policy="auto", method=method, port=0, grpc_port=port
    )
    async with running(options) as (url, app):
        name, told = app.service.served.name, []
        for module, address in ((http, url.removeprefix("http://")), (rpc, f"127.0.0.1:{port}")):

            async def ask(client: Any, number: int, module: Any = module) -> Any:
                tensor = module.InferInput("ids", [1, 20], "INT64")
                tensor.set_data_from_numpy(np.full((1, 20), number, np.int64))
                return await client.infer(name, [tensor])

            async with module.InferenceServerClient(address) as client:
                for _ in range(3):
                    with pytest.raises(InferenceServerException) as caught:
                        await ask(client, ids)
                    told.append((caught.value.status(), caught.value.message()))
                found = await ask(client, 1)
                assert found.as_numpy("output").shape == (1, 3)
    statuses, messages = zip(*told, strict=True)
    assert statuses == ("400",) * 3 + ("StatusCode.INVALID_ARGUMENT",) * 3
    assert len(set(messages)) == 1, "the same reason"
    assert "the model fails on this input: " in messages[0]


@pytest.mark.parametrize(("asked", "recommended"), [(None, True), (0.3, True), (None, False)])
def test_the_suggested_limit_is_kept_unless_the_user_says_another(
    asked: float | None, recommended: bool, finished: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(finished, tmp_path / "out")
    found = description(folder)
    assert found["limit"] in LIMITS
    if not recommended:  # a limit is for one backup
        (folder / DESCRIPTION).write_text(json.dumps({**found, "recommended": "other"}))
    method = found["recommended"]
    gate = open_app(served(folder, method=method, max_disagreement=asked)).dispatcher.gate
    assert gate is not None
    assert gate.limit == (asked or (found["limit"] if recommended else None))


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"format_version": 1}, "is of another release: run codedinvnet protect again"),
        ({"model": {}}, "is damaged"),
        ({"recommended": None, "reason": "it is too slow"}, "recommends no backup: it is too slow"),
        ({"work": 0.6}, "takes 0.60 of the model.s time.*policy hedge"),
        ({"digest": "0"}, "is not the file that this protection was made with"),
        ({"recommended": "ghost"}, "has no backup 'ghost'"),
        ({"recommended": "ghost", "method": "ghost"}, "ghost.onnx"),
        ({"recommended": "../x", "method": "../x"}, "is damaged"),
        ({"k": 10**9}, "is damaged"),
        ({"k": 0}, "is damaged"),
        ({"backup_workers": 10**9}, "is damaged"),
        ({"work": -1.0}, "is damaged"),
    ],
)
def test_a_folder_that_is_no_good_protection_is_refused(
    change: dict[str, Any], why: str, finished: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(finished, tmp_path / "changed")
    found = description(folder)
    for key, value in change.items():
        (row if key in (row := found["table"][0]) else found)[key] = value
    (folder / DESCRIPTION).write_text(json.dumps(found))
    with pytest.raises(UserError, match=why):
        load_protection(folder, open_model(f"{PLACE}:vectors"))


@pytest.mark.parametrize("what", ["model", "protection"])
def test_a_start_that_never_ends_says_what_it_waits_for_and_ends(
    what: str, finished: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(finished, tmp_path / "endless")
    endless = endless_onnx(tmp_path / "model.onnx", FEATURES)
    words = ["serve", str(endless), "--port", "0"]
    if what == "protection":
        for file in folder.glob("*.onnx"):
            shutil.copy(endless, file)
        words = ["serve", f"{PLACE}:vectors", "--protection", str(folder), "--port", "0"]
    code = (
        "import sys; from codedinvnet.cli import main; from codedinvnet.serving import opened; "
        f"opened.SLOW, opened.LIMIT = 0.2, 1.0; sys.exit(main({words!r}))"
    )
    ended = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120
    )
    waits, error = ended.stderr.splitlines()[-2:]
    named = words[1] if what == "model" else str(folder)
    assert json.loads(waits)["what"] == f"the {what} {named}"
    assert error.startswith(f"error: the {what} {named} was not opened within 1 s")
    assert ended.returncode == 2


@pytest.mark.parametrize(
    ("source", "more", "why"),
    [
        (f"{PLACE}:colours", {}, "protects tests.protection.factories:vectors with digest"),
        (f"{PLACE}:vectors", {"method": "oracle"}, "no backup 'oracle'"),
        (f"{PLACE}:vectors", {"policy": "hedge"}, "--protection: goes with a coded policy"),
        ("mnist", {}, "--protection: is for a model of your own"),
        (f"{PLACE}:vectors", {"k": 4}, "--k: goes without --protection, which has its own"),
    ],
)
def test_what_a_protection_does_not_go_with(
    source: str, more: dict[str, Any], why: str, finished: Path
) -> None:
    options = served(finished, **{**more, "source": source})
    with pytest.raises(UserError, match=re.escape(why)):
        answers(options, {})
