"""Requests to a served model: what fits it, what is refused, and how answers are joined."""

from __future__ import annotations

import asyncio
import json
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from codedinvnet.models.base import Signature, TensorSpec
from codedinvnet.net.protocol import http
from codedinvnet.net.protocol.messages import InferRequest, ProtocolError
from codedinvnet.serving.answers import DeadlinePassed, QueryFailed
from codedinvnet.serving.served import Classifier, OwnModel
from codedinvnet.serving.service import InferenceService, ServedResponse, Terms
from tests.serving.stub import Stub

IMAGES = Stub().service(Classifier("mnist", (1, 2, 3), ("cat", "dog", "bird")))
TEXTS = Stub().service(
    OwnModel(
        "own",
        Signature(
            inputs=(TensorSpec("tokens", "INT32", (3,)), TensorSpec("text", "BYTES", ())),
            outputs=(TensorSpec("scores", "FP64", (2,)), TensorSpec("outcome", "BOOL", ())),
            platform="onnxruntime_onnx",
        ),
        texts=True,
    )
)


def tensor(**changes: Any) -> dict[str, Any]:
    """Return a good input with changes; None leaves a key out."""
    data = [0, 1, 2, 3, 4, 255]
    made = {"name": "images", "shape": [1, 1, 2, 3], "datatype": "UINT8", "data": data, **changes}
    return {key: value for key, value in made.items() if value is not None}


def parse(service: InferenceService, *inputs: Any, **more: Any) -> InferRequest:
    body = json.dumps({"inputs": list(inputs), **more}).encode()
    return http.parse_request(body, limits=service.limits, check=service.check)


TOKENS = {"name": "tokens", "shape": [2, 3], "datatype": "INT32", "data": [1, 2, 3, 4, 5, -6]}
TEXT = {"name": "text", "shape": [2], "datatype": "BYTES", "data": ["a", "ä"]}
BAD: list[tuple[InferenceService, list[dict[str, Any]], dict[str, Any], str]] = [
    *[
        (IMAGES, [tensor(**changes)], {}, message)
        for changes, message in (
            ({"name": "image"}, "inputs.0.name: must be 'images', got 'image'"),
            ({"name": "x" * 10_000}, "inputs.0.name: must be 'images', got 'xxx"),
            ({"datatype": "INT8"}, "inputs.0.datatype: 'images' must be UINT8 or FP32, got 'INT8'"),
            ({"shape": [1, 2, 3]}, "inputs.0.shape: 'images' must be [B, 1, 2, 3] with B >= 1"),
            ({"shape": [1, 1, 3, 2]}, "inputs.0.shape: 'images' must be"),
            ({"shape": [0, 1, 2, 3]}, "inputs.0.shape: 'images' must be"),
            ({"shape": []}, "inputs.0.shape: 'images' must be"),
            ({"shape": [5, 1, 2, 3]}, "inputs.0.shape: at most 4 queries, got 5"),
            ({"parameters": {"shared_memory_region": "x"}}, "inputs.0.parameters: shared memory"),
        )
    ],
    (IMAGES, [], {}, "inputs: the model takes 1 ('images'), got 0"),
    (TEXTS, [TOKENS], {}, "inputs: the model takes 2 ('tokens', 'text'), got 1"),
    (TEXTS, [TOKENS, {**TEXT, "datatype": "FP32"}], {}, "inputs.1.datatype: 'text' must be BYTES"),
    (TEXTS, [TOKENS, {**TEXT, "shape": [1], "data": ["a"]}], {}, "inputs.1.shape: 'text' has 1"),
    (IMAGES, [tensor()], {"outputs": [{"name": "logits"}]}, "outputs.0.name: 'logits' is not one"),
    *[
        (
            IMAGES,
            [tensor()],
            {"outputs": [{"name": "label", "parameters": {key: 2}}]},
            "outputs.0.parameters: classification and shared memory",
        )
        for key in ("classification", "shared_memory_region")
    ],
]


@pytest.mark.parametrize(("service", "inputs", "more", "message"), BAD)
def test_requests_that_do_not_fit_the_model(
    service: InferenceService, inputs: list[Any], more: dict[str, Any], message: str
) -> None:
    with pytest.raises(ProtocolError) as caught:
        parse(service, *inputs, **more)
    assert str(caught.value).startswith(message)
    assert len(str(caught.value)) < 300


VALUES: list[tuple[InferenceService, list[dict[str, Any]], str]] = [
    (IMAGES, [tensor(datatype="FP32", data=[0, 0, 0, 0, 0, bad])], "inputs.0.data: FP32 values")
    for bad in (1.5, -0.1)
]


@pytest.mark.parametrize(("service", "inputs", "message"), VALUES)
def test_values_that_the_model_does_not_take(
    service: InferenceService, inputs: list[Any], message: str
) -> None:
    with pytest.raises(ProtocolError, match=message):
        asyncio.run(service.answer(parse(service, *inputs), 0.0))


def test_bytes_that_are_no_text_are_refused_where_texts_are_taken() -> None:
    request = parse(TEXTS, TOKENS, TEXT)
    bad = replace(request, inputs={**request.inputs, "text": np.array([b"a", b"\xff"], object)})
    with pytest.raises(ProtocolError, match=r"^inputs\.1\.data: element 1 must be text in UTF-8"):
        asyncio.run(TEXTS.answer(bad, 0.0))


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("timeout", [0, -1, "5", True, [5], 0.0]),
        ("accept_decoded", [0, 1, "no", None, []]),
        ("max_disagreement", [0, 1, -0.1, "0.1", True, [0.1]]),
    ],
)
def test_terms_that_are_wrong(name: str, values: list[Any]) -> None:
    for value in values:
        with pytest.raises(ProtocolError, match=rf"^parameters\.{name}: must "):
            Terms.of({name: value})


def answer(stub: Stub, *outputs: str, **parameters: Any) -> ServedResponse:
    asked = parse(
        stub.service(),
        {"name": "a", "shape": [2, 2], "datatype": "FP32", "data": [0, 1, 2, 3]},
        {"name": "b", "shape": [2], "datatype": "INT64", "data": [10, 20]},
        outputs=[{"name": name} for name in outputs],
        parameters=parameters,
        id="q",
    )
    return asyncio.run(stub.service().answer(asked, 5.0, seconds=3.0))


def test_a_request_is_split_and_its_answers_are_joined() -> None:
    stub = Stub()
    response = answer(stub, "outcome", "sum", "b", timeout=2_000_000, own=1)
    message = response.message
    assert list(message.outputs) == ["outcome", "sum", "b"]
    assert message.outputs["sum"].dtype == np.float32
    assert message.outputs["sum"].tolist() == [[10, 11], [22, 23]]
    assert message.outputs["b"].tolist() == [10, 20]
    assert message.outputs["outcome"].tolist() == [b"outcome 0", b"outcome 1"]
    assert (message.model_name, message.model_version, message.id) == ("own", "1", "q")
    assert message.parameters == {"timeout": 2_000_000, "own": 1, "outcome": "outcome 1"}
    assert response.work_seconds == pytest.approx(0.1)
    assert (stub.asked["name"], stub.asked["deadline"], stub.asked["began"]) == ("q", 2.0, 5.0)
    assert list(answer(stub).message.outputs) == ["sum", "b", "outcome"]
    assert stub.asked["deadline"] == 3.0  # the client's own


@pytest.mark.parametrize(
    ("outputs", "accept", "taken"),
    [(("sum", "outcome"), True, True), (("sum",), False, False), (("sum", "b"), True, False)],
)
def test_outputs_that_decoded_answers_lack_are_answered_directly(
    outputs: tuple[str, ...], accept: bool, taken: bool
) -> None:
    stub = Stub()
    answer(stub, *outputs, accept_decoded=accept)
    assert stub.asked["accept_decoded"] is taken


def test_a_request_is_answered_as_a_whole_or_not_at_all() -> None:
    late = "1 of 2 queries: deadline passed"
    for problem, told in (
        (DeadlinePassed("deadline"), late),
        (DeadlinePassed("deadline", "it refused"), f"{late}; last failure: it refused"),
        (DeadlinePassed("deadline", where="at worker 3"), f"{late}; at worker 3"),
    ):
        with pytest.raises(DeadlinePassed) as caught:
            answer(Stub(problem), "sum")
        assert str(caught.value) == told
    with pytest.raises(QueryFailed, match=r"^2 of 2 queries failed: lost 5 times$") as lost:
        answer(Stub(DeadlinePassed("deadline"), QueryFailed("lost 5 times")), "sum")
    assert not isinstance(lost.value, DeadlinePassed)


def test_a_method_without_direct_answers_cannot_give_one() -> None:
    stub = Stub()
    stub.scheduler.systematic = False
    with pytest.raises(ProtocolError, match=r"^parameters\.accept_decoded: "):
        answer(stub, "sum", accept_decoded=False)
    answer(stub, "sum")


def test_a_limit_on_disagreement_is_repeated_as_it_holds_or_refused() -> None:
    stub = Stub()
    with pytest.raises(ProtocolError, match="max_disagreement"):
        answer(stub, "sum", max_disagreement=0.1)
    assert stub.asked == {}
    stub.gate = SimpleNamespace(limit=0.01, kept=lambda asked: min(asked, 0.01))
    found = answer(stub, "sum", max_disagreement=0.1)
    assert found.message.parameters == {"max_disagreement": 0.01, "outcome": "outcome 1"}
    assert stub.asked["limit"] == 0.1
