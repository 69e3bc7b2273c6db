"""A gateway that goes by its protection's calibration, as a service does."""

from __future__ import annotations

import asyncio
import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from tritonclient.grpc import service_pb2 as pb

from codedinvnet.errors import UserError
from codedinvnet.models.base import HEADER_LENGTH
from codedinvnet.protect.calibration import protection_calibration
from codedinvnet.serving import decoding, reliance
from tests.observing import counted, until
from tests.protect.conftest import finished  # noqa: F401
from tests.protect.factories import FEATURES
from tests.serving.gateway.asking import Got, ask_grpc
from tests.serving.gateway.fakes import gateway
from tests.serving.gateway.servers import MODEL, SMALL, Server, asked, queries, scores

LIMIT = 0.2
ROUNDS = 200


def told(got: Got) -> dict[str, Any]:
    """Return the parameters of an answer."""
    assert got.status == 200, got.body
    found: dict[str, Any] = json.loads(got.body[: int(got.headers[HEADER_LENGTH])])["parameters"]
    return found


def message(x: np.ndarray, accept_decoded: bool = True, **limits: float) -> bytes:
    request = pb.ModelInferRequest(model_name="m", raw_input_contents=[x.tobytes()])
    request.inputs.add(name="x", datatype="FP32", shape=x.shape)
    request.parameters["accept_decoded"].bool_param = accept_decoded
    for name, limit in limits.items():
        request.parameters[name].double_param = limit
    found: bytes = request.SerializeToString()
    return found


async def test_an_approximate_answer_tells_how_likely_it_agrees(finished: Path) -> None:  # noqa: F811
    """Over HTTP and gRPC, as low as that of its least sure query; a direct answer has none."""
    server = Server()
    curve = protection_calibration(finished).curve("small-backup", 4)
    assert curve is not None

    async with gateway(server, protection=finished, grpc_port=0, **SMALL) as (address, _, port):
        assert set(told(await asked(address, queries(2), accept_decoded=False))) == {"outcome"}
        server.hold()
        got = await asked(address, queries(3))
        found = told(got)
        assert found["outcome"] == "decoded"
        scores = np.frombuffer(got.body[int(got.headers[HEADER_LENGTH]) :], np.float32)
        chances = np.exp(scores.reshape(3, -1))
        least = (chances / chances.sum(1, keepdims=True)).max(1).min()
        expected = float(curve.probability(np.array([least]))[0])
        assert found["agreement_probability"] == pytest.approx(expected)
        body, _ = await ask_grpc(port, message(queries(3)))
        parameters = pb.ModelInferResponse.FromString(body).parameters
        assert parameters["outcome"].string_param == "decoded"
        assert parameters["agreement_probability"].double_param == pytest.approx(expected)
        server.go()
        body, _ = await ask_grpc(port, message(queries(3), accept_decoded=False))
        assert set(pb.ModelInferResponse.FromString(body).parameters) == {"outcome"}


async def test_what_is_not_sure_enough_waits_for_the_upstream(finished: Path) -> None:  # noqa: F811
    server = Server()

    async with gateway(
        server, protection=finished, grpc_port=0, max_disagreement=LIMIT, **SMALL
    ) as (address, relay, port):
        reliance = relay.front.reliance
        assert reliance is not None
        assert reliance.limit == LIMIT
        for kind in reliance.thresholds:  # whatever the calibration says of this small model
            reliance.thresholds[kind] = 0.0 if kind[0] == LIMIT else math.inf
        server.hold()
        assert told(await asked(address, queries(1)))["outcome"] == "decoded"
        loose = told(await asked(address, queries(1), max_disagreement=0.9))
        assert (loose["outcome"], loose["max_disagreement"]) == ("decoded", LIMIT)
        strict = asyncio.create_task(asked(address, queries(1), max_disagreement=LIMIT / 2))
        over_grpc = asyncio.create_task(
            ask_grpc(port, message(queries(1), max_disagreement=LIMIT / 2))
        )
        done, _ = await asyncio.wait({strict, over_grpc}, timeout=0.7)
        assert not done
        server.go()
        found = told(await strict)
        assert (found["outcome"], found["max_disagreement"]) == ("direct", LIMIT / 2)
        body, _ = await over_grpc
        parameters = pb.ModelInferResponse.FromString(body).parameters
        assert parameters["max_disagreement"].double_param == LIMIT / 2


async def test_without_a_limit_a_request_that_asks_for_one_waits(finished: Path) -> None:  # noqa: F811
    server = Server()

    async with gateway(server, protection=finished, **SMALL) as (address, _, _):
        server.hold()
        strict = asyncio.create_task(asked(address, queries(1), max_disagreement=0.01))
        assert told(await asked(address, queries(1)))["outcome"] == "decoded"
        assert not strict.done()
        server.go()
        assert told(await strict)["outcome"] == "direct"


async def test_upstreams_that_disagree_stop_the_release(
    finished: Path,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(decoding, "CHECKED_SHARE", 1.0)
    server = Server()

    def changed(inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        return {"output": np.roll(MODEL.run(inputs)["output"], 1, axis=1)}

    async with gateway(server, protection=finished, max_disagreement=LIMIT, **SMALL) as (
        address,
        relay,
        _,
    ):
        reliance = relay.front.reliance
        assert reliance is not None
        reliance.thresholds = dict.fromkeys(reliance.thresholds, 0.0)
        reliance.strict_thresholds = reliance.thresholds

        async def groups(count: int) -> None:
            for i in range(count):
                await asyncio.gather(*(asked(address, queries(2, 4 * i + j)) for j in range(4)))

        await groups(30)
        assert reliance.releasing
        assert (relay.front.metrics.live_agreement() or 0.0) > 0.8
        server.model = SimpleNamespace(signature=MODEL.signature, run=changed)  # type: ignore[assignment]
        await groups(30)
        assert reliance.releasing is False
        server.hold()
        late = asyncio.create_task(asked(address, queries(1)))
        done, _ = await asyncio.wait({late}, timeout=0.7)
        assert not done
        server.go()
        assert told(await late)["outcome"] == "direct"


async def test_an_upstream_that_answers_wrongly_is_told(
    finished: Path,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """So are the requests that got its answers, and none of those that the backup answered."""
    monkeypatch.setattr(decoding, "CHECKED_SHARE", 1.0)
    monkeypatch.setattr(reliance, "LATELY", 4 * ROUNDS)  # all are told
    servers = [Server() for _ in range(4)]
    misled: list[set[str]] = []  # requests of each round that got a wrong answer

    def changed(inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        return {"output": np.roll(MODEL.run(inputs)["output"], 1, axis=1)}

    # However long requests take, a round is a group, and nobody hangs.
    patient = {"group_timeout_ms": 10_000, "deadline_ms": 60_000, "hang_timeout_ms": 50_000}
    async with gateway(*servers, protection=finished, **patient, **SMALL) as (address, relay, _):
        servers[1].model = SimpleNamespace(signature=MODEL.signature, run=changed)  # type: ignore[assignment]
        servers[1].hold()  # the backup answers in its place, in the first round
        wrong = relay.front.metrics.wrong_workers

        async def ask(number: int, j: int) -> None:
            x, name, accepts = queries(1, 4 * number + j), f"{number}.{j}", number % 2 == 0
            answer, outcome = scores(await asked(address, x, name, accept_decoded=accepts))
            if outcome == "direct" and not np.allclose(answer, MODEL.run({"x": x})["output"]):
                misled[-1].add(name)

        for number in range(ROUNDS):
            misled.append(set())
            await asyncio.gather(*(ask(number, j) for j in range(4)))
            servers[1].go()
            if counted(wrong.labels("1")):
                break
        assert [counted(wrong.labels(str(i))) for i in range(4)] == [0, 1, 0, 0]
    (record,) = [r for r in caplog.records if r.message == "worker answers wrongly"]
    named = set(record.__dict__["fields"]["requests"])
    earlier = set[str]().union(*misled[:-1])
    assert earlier
    assert earlier <= named <= earlier | misled[-1]  # it was found out during the last round


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"max_disagreement": 2.0, "method": "approxifer"}, "must lie between 0 and 1"),
        ({"max_disagreement": 0.1, "method": "approxifer"}, "goes with a calibrated --protection"),
        ({"max_disagreement": 0.1}, "goes with a calibrated --protection"),
    ],
)
async def test_limits_that_cannot_be_kept_are_refused(
    options: dict[str, Any], problem: str
) -> None:
    with pytest.raises(UserError, match=f"--max-disagreement: {problem}"):
        async with gateway(Server(), Server(), **options) as _:
            raise AssertionError("it started")


async def test_without_direct_answers_no_limit_is_kept(finished: Path) -> None:  # noqa: F811
    code = {"protection": finished, "method": "approxifer"}
    with pytest.raises(UserError, match="--max-disagreement: approxifer has no direct answers"):
        async with gateway(*(Server() for _ in range(5)), max_disagreement=0.1, **code) as _:
            raise AssertionError("it started")
    async with gateway(*(Server() for _ in range(5)), **code) as (address, _, _):
        got = await asked(address, queries(4), max_disagreement=0.1)
        assert got.status == 400
        assert b"keeps no limit" in got.body


async def test_a_code_of_a_protection_tells_the_probability_over_both_faces(finished: Path) -> None:  # noqa: F811
    servers = [Server() for _ in range(5)]

    options = {"method": "code", "deadline_ms": 20_000, "grpc_port": 0}
    async with gateway(*servers, protection=finished, **options) as (address, relay, port):
        assert relay.front.reliance is not None
        servers[2].hold()
        x = np.random.default_rng(1).random((4, FEATURES), np.float32)
        found = told(await asked(address, x))
        assert found["outcome"] == "decoded,direct"
        assert 0 < found["agreement_probability"] < 1
        servers[2].go()
        await until(lambda: not relay.front.scheduler.flying.groups)
        servers[2].hold()
        body, _ = await ask_grpc(port, message(x))
        parameters = pb.ModelInferResponse.FromString(body).parameters
        agreement = parameters["agreement_probability"].double_param
        assert agreement == pytest.approx(found["agreement_probability"])
        servers[2].go()
