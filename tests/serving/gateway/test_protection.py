"""A gateway that answers in place of late upstreams by a small backup, and what it refuses."""

from __future__ import annotations

import asyncio
import json
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tritonclient.grpc import service_pb2 as pb

from codedinvnet.codes.rules import AnswersAll
from codedinvnet.errors import UserError
from codedinvnet.files import read_json, write_json
from codedinvnet.models.base import HEADER_LENGTH, Scores, Signature
from codedinvnet.protect.folder import DESCRIPTION, WEIGHTS, load_part
from codedinvnet.serving import decoding
from codedinvnet.serving.decoding import Job, Wiring
from codedinvnet.serving.gateway import backup
from codedinvnet.serving.gateway.backup import Backing, BackupAnswers
from codedinvnet.serving.gateway.pool import boxed
from codedinvnet.serving.gateway.relay import Relay
from codedinvnet.serving.gateway.understanding import Understanding
from codedinvnet.serving.metrics import Metrics
from codedinvnet.serving.served import OwnModel
from tests.observing import until
from tests.protect.conftest import PLACE, finished  # noqa: F401
from tests.protect.factories import FEATURES
from tests.serving.gateway.asking import ask, ask_grpc
from tests.serving.gateway.fakes import Fake, gateway
from tests.serving.gateway.servers import (
    MODEL,
    SMALL,
    SMALLER,
    Server,
    asked,
    message,
    queries,
    scores,
)

FLAWED = b'{"inputs":[{"name":"x","datatype":"FP32","shape":[1,1],"data":[1]}]}'


def student(folder: Path, x: np.ndarray) -> np.ndarray:
    with torch.inference_mode():
        found: np.ndarray = load_part(folder / WEIGHTS)(torch.from_numpy(x)).numpy()
    return found


async def refused(told: str, *servers: Fake, **options: Any) -> None:
    with pytest.raises(UserError, match=told):
        async with gateway(*servers, **options):
            raise AssertionError("it started")


async def test_late_requests_are_answered_by_the_protections_backup(finished: Path) -> None:  # noqa: F811
    """Each with its own number of queries, and in the form that its client wants."""
    server = Server()

    async with gateway(
        server, protection=finished, method="small-backup", policy="small-backup", grpc_port=0
    ) as (address, _, port):
        exact = await asked(address, queries(2), accept_decoded=False)
        direct, outcome = scores(exact)
        assert outcome == "direct"
        assert direct.tobytes() == MODEL.run({"x": queries(2)})["output"].tobytes()
        server.hold()
        many = [queries(size, size) for size in (1, 3, 2)]
        found = await asyncio.gather(*(asked(address, x) for x in many))
        for x, got in zip(many, found, strict=True):
            answer, outcome = scores(got)
            assert outcome == "decoded"
            assert answer == pytest.approx(student(finished, x), abs=1e-4)
            assert json.loads(got.body[: int(got.headers[HEADER_LENGTH])])["id"] == "mine"
        text = {"inputs": [{"name": "x", "datatype": "FP32", "shape": [1, FEATURES]}]}
        text["inputs"][0]["data"] = queries(1).ravel().tolist()
        got = await ask(address, json.dumps(text).encode())
        told = json.loads(got.body)
        assert told["outputs"][0]["data"] == pytest.approx(student(finished, queries(1))[0])
        body, trailers = await ask_grpc(port, message(queries(1)))
        reply = pb.ModelInferResponse.FromString(body)
        assert (reply.id, trailers["codedinvnet-outcome"]) == ("9", "decoded")
        assert reply.parameters["outcome"].string_param == "decoded"
        assert reply.raw_output_contents[0] == pytest.approx(
            student(finished, queries(1)).tobytes()
        ) or np.frombuffer(reply.raw_output_contents[0], np.float32) == pytest.approx(
            student(finished, queries(1))[0], abs=1e-4
        )
        server.go()


async def test_two_backup_workers_give_each_request_its_own_answer(finished: Path) -> None:  # noqa: F811
    """Each of the two tasks is over some members of the group alone."""
    server = Server()
    own = {"method": "own-backup", "policy": "small-backup", "backup_workers": 2}

    async with gateway(server, protection=finished, group_timeout_ms=200, **own) as (
        address,
        relay,
        _,
    ):
        assert relay.front.scheduler.dispatcher.code.r == 2
        server.hold()
        for sizes in ((1, 3, 2), (2, 1, 4, 3)):  # a group of three, and a full one
            many = [queries(size, size) for size in sizes]
            found = await asyncio.gather(*(asked(address, x) for x in many))
            for x, got in zip(many, found, strict=True):
                answer, outcome = scores(got)
                assert outcome == "decoded"
                assert answer == pytest.approx(SMALLER.run({"x": x})["output"], abs=1e-4)
        server.go()


@pytest.mark.parametrize("large", [False, True])
async def test_answers_of_two_backup_workers_are_compared(
    large: bool,
    finished: Path,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(decoding, "CHECKED_SHARE", 1.0)
    x = queries(200)
    labels, same = (model.run({"x": x})["output"].argmax(1) for model in (MODEL, SMALLER))
    alike = [np.flatnonzero((labels == same) & (labels == label)) for label in np.unique(labels)]
    agreed = [x[rows[:1]] for rows in alike if len(rows)]
    assert len(agreed) > 1  # so that another one's answer differs
    own = {"method": "own-backup", "policy": "small-backup", "backup_workers": 2}
    scores_of, threads = Understanding.scores_of, set()
    if large:
        monkeypatch.setattr(backup, "LARGE_BODY", 1)

    def apart(*words: Any) -> np.ndarray:
        threads.add(threading.get_ident())
        return scores_of(*words)

    monkeypatch.setattr(Understanding, "scores_of", apart)

    async with gateway(Server(), protection=finished, **own) as (address, relay, _):
        metrics = relay.front.metrics
        for _ in range(5):
            await asyncio.gather(*(asked(address, agreed[i % len(agreed)]) for i in range(4)))
        await until(lambda: metrics.live_agreement() is not None)
        assert metrics.live_agreement() == 1.0
        assert (threading.get_ident() in threads) is not large
    assert "internal error" not in caplog.messages


def queue_of(signature: Signature) -> BackupAnswers:
    wiring = Wiring(Metrics(), lambda _: None, lambda *_: None, lambda _: None)
    return Backing(AnswersAll(4), Understanding(OwnModel("m", signature))).queue(wiring)


async def test_an_answers_confidence_is_the_calibrated_one() -> None:
    """Also of probabilities that do not sum to 1, or that are negative."""
    signature = replace(MODEL.signature, scores=Scores("output", "probabilities"))
    odd = np.array([[0.8, 0.5, -0.3], [1.2, -0.1, -0.1]], np.float32)
    (found,) = await queue_of(signature).answers([Job(1, {4: boxed(odd)}, {7: 0})])
    assert isinstance(found, dict)
    assert found[7].confidence == pytest.approx(0.8 / 1.3)


async def test_a_job_does_not_fail_for_another() -> None:
    queue = queue_of(MODEL.signature)
    sound = Job(1, {4: boxed(np.array([[0.0, 9.0, 0.0]], np.float32))}, {7: 0})
    lost, answered = await queue.answers([Job(1, {}, {6: 0}), sound])
    assert isinstance(lost, Exception)
    assert isinstance(answered, dict)
    assert answered[7].confidence > 0.99


async def test_what_no_upstream_answered_is_not_compared(
    finished: Path,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(decoding, "CHECKED_SHARE", 1.0)
    server = Server()

    async with gateway(server, protection=finished, deadline_ms=2000, **SMALL) as (
        address,
        relay,
        _,
    ):
        server.hold()
        assert scores(await asked(address, queries(1)))[1] == "decoded"
        await until(lambda: not relay.front.scheduler.flying.groups)  # it is given up
        server.go()
    assert "internal error" not in caplog.messages


async def test_who_wants_no_approximate_answer_gets_none(finished: Path) -> None:  # noqa: F811
    server = Server()

    async with gateway(server, protection=finished, **SMALL) as (address, _, _):
        server.hold()
        exact = asyncio.create_task(asked(address, queries(1), accept_decoded=False))
        strange = asyncio.create_task(ask(address, FLAWED))
        answer, outcome = scores(await asked(address, queries(2)))
        assert (len(answer), outcome) == (2, "decoded")
        assert not exact.done()
        assert not strange.done()
        server.go()
        assert scores(await exact)[1] == "direct"
        assert (await strange).status == 400


@pytest.mark.parametrize("versions", [["3"], ["2", "3"], None])
async def test_a_request_for_another_version_waits_for_an_upstream(
    versions: list[str] | None,
    finished: Path,  # noqa: F811
) -> None:
    """The backup is made of the version that is asked without a name."""
    server = Server()
    server.metadata["versions"] = versions
    same_outcome = "decoded" if versions == ["3"] else "direct"

    async with gateway(server, protection=finished, grpc_port=0, **SMALL) as (address, _, port):
        server.hold()
        before = len(server.seen)
        other = asyncio.create_task(asked(address, queries(1), version="2"))
        over_grpc = asyncio.create_task(ask_grpc(port, message(queries(1), version="2")))
        same = asyncio.create_task(asked(address, queries(1), version="3"))
        got = await asked(address, queries(1))
        told = json.loads(got.body[: int(got.headers[HEADER_LENGTH])])
        assert scores(got)[1] == "decoded"
        assert told.get("model_version") == ("3" if versions == ["3"] else None)
        if same_outcome == "decoded":
            assert scores(await same)[1] == same_outcome
        await until(lambda: len(server.seen) >= before + 3)
        assert not other.done()
        assert not over_grpc.done()
        server.go()
        assert scores(await other)[1] == "direct"
        assert (await over_grpc)[1]["codedinvnet-outcome"] == "direct"
        assert scores(await same)[1] == same_outcome


async def test_the_backup_answers_while_no_upstream_does(finished: Path) -> None:  # noqa: F811
    server = Server()

    async with gateway(
        server, protection=finished, method="small-backup", policy="small-backup", deadline_ms=20000
    ) as (address, relay, _):
        await server.stop()
        found = await asyncio.gather(*(asked(address, queries(1, i)) for i in range(20)))
        assert {scores(got)[1] for got in found} == {"decoded"}
        await until(lambda: not relay.pool.places[0].up)
        assert relay.is_ready


async def test_auto_asks_the_backup_for_what_is_late_or_lost(finished: Path) -> None:  # noqa: F811
    server = Server()

    options = {"method": "small-backup", "deadline_ms": 20_000, "hang_timeout_ms": 1000}
    async with gateway(server, protection=finished, **options) as (address, _, _):
        for i in range(40):  # what is normal is known then
            assert scores(await asked(address, queries(1, i)))[1] == "direct"
        server.hold()
        assert scores(await asked(address, queries(2)))[1] == "decoded"
        server.go()
        await server.stop()
        found = await asyncio.gather(*(asked(address, queries(1, i)) for i in range(9)))
        assert {scores(got)[1] for got in found} == {"decoded"}


def test_a_backup_may_be_an_upstream() -> None:
    server, small = Server(), Server(f"{PLACE}:smaller")

    async def check(address: str, relay: Relay, _: object) -> None:
        assert not small.seen or all(len(body) for _, _, body in small.seen)
        before = len(small.seen)
        server.hold()
        x = queries(7)
        answer, outcome = scores(await asked(address, x))
        assert outcome == "decoded"
        assert answer == pytest.approx(small.model.run({"x": x})["output"], abs=1e-5)
        assert len(small.seen) - before == 2  # it is asked for k at a time
        assert small.seen[-1][0] == "/v2/models/m/infer"
        server.go()
        small.status = 500  # nobody is lost with it
        assert scores(await asked(address, queries(1)))[1] == "direct"

    async def all_of_it() -> None:
        await small.start()
        try:
            url = f"{small.url}/v2/models/m"
            async with gateway(server, backup_upstream=url, k=4, policy="small-backup+hedge") as (
                address,
                relay,
                port,
            ):
                await check(address, relay, port)
        finally:
            await small.stop()

    asyncio.run(all_of_it())


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"protection": "."}, "holds no protection"),
        ({"method": "parm"}, "parm"),
        ({"method": "approxifer"}, "k must be at least 2"),
        ({"method": "approxifer", "policy": "hedge"}, "--policy: hedge goes without"),
        ({"policy": "small-backup"}, "--policy: small-backup needs"),
        ({"backup_upstream": "http://127.0.0.1:9"}, "--backup-upstream: 'http://127.0.0.1:9' is"),
        ({"backup_upstream": "http://127.0.0.1:9/v2/models/m"}, "--backup-upstream: none answers"),
        ({"method": "approxifer", "scores": "nothing"}, "has no output 'nothing'"),
    ],
)
async def test_what_does_not_go_with_the_upstreams_is_refused(
    options: dict[str, Any], told: str
) -> None:
    if "protection" in options:
        options = {"protection": Path(options["protection"])}
    await refused(told.replace("(", r"\("), Server(), Server(), **options)


async def test_the_protection_of_another_model_is_refused(
    finished: Path,  # noqa: F811
    tmp_path: Path,
) -> None:
    smaller, other = Server(f"{PLACE}:smaller"), Server(f"{PLACE}:other_inputs")
    differs = "is another model: its scores of the same inputs differ"
    await refused(differs, smaller, protection=finished)
    await refused("with the tensors", other, protection=finished)
    damaged = read_json(finished / DESCRIPTION)
    del damaged["model"]["probe"]
    write_json(tmp_path / DESCRIPTION, damaged)
    await refused(r"is damaged: missing key 'model\.probe'", Server(), protection=tmp_path)


async def test_a_code_of_a_protection_has_no_backup_workers(finished: Path) -> None:  # noqa: F811
    servers = [Server() for _ in range(5)]
    options = {"protection": finished, "method": "nercc", "backup_workers": 2}
    await refused("--backup-workers: nercc is computed by the upstreams", *servers, **options)


async def test_a_backup_for_other_inputs_is_refused() -> None:
    server, small = Server(), Server(f"{PLACE}:other_inputs")
    await small.start()
    try:
        url = f"{small.url}/v2/models/m"
        await refused("--backup-upstream: .* takes", server, backup_upstream=url)
    finally:
        await small.stop()
