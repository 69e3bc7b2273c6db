"""Requests and responses of the protocol V2: tensors, parameters, outputs, metadata."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from codedinvnet.models.base import Signature, TensorSpec
from codedinvnet.serving.answers import BadRequest
from codedinvnet.serving.faces.parameters import MOST_PARAMETERS
from codedinvnet.serving.faces.v2 import (
    model_metadata,
    render_response,
    server_metadata,
)
from codedinvnet.serving.served import OwnModel
from codedinvnet.serving.service import Request, Response
from tests.serving.faces.requests import (
    MODEL,
    PIXELS,
    answered,
    binary,
    body,
    images_of,
    parse,
    tensor,
)


@pytest.mark.parametrize("data", [PIXELS, [0, 1, 2, 3, 4, 255]], ids=["nested", "flat"])
def test_json_pixels(data: list[Any]) -> None:
    request = parse(body(tensor(data=data)))
    images = request.inputs["images"]
    assert images.dtype == np.uint8
    assert images.tolist() == PIXELS
    assert (request.identity, request.parameters) == (None, {})
    assert request.accept_decoded
    assert request.timeout is None
    assert request.outputs == (("probabilities", False), ("label", False), ("outcome", False))


def test_json_floats() -> None:
    values = [0, 0.25, 1, 0.5, 1.0, 1e-3]
    images = images_of(body(tensor(datatype="FP32", data=values)))
    assert images.dtype == np.float32
    assert images.ravel().tolist() == np.array(values, np.float32).tolist()


@pytest.mark.parametrize("count", [1, 4])
def test_binary_pixels(count: int) -> None:
    pixels = np.arange(count * 6, dtype=np.uint8).reshape(count, 1, 2, 3)
    data, header = binary(pixels, datatype="UINT8")
    images = images_of(data, header)
    assert images.dtype == np.uint8
    assert np.array_equal(images, pixels)


def test_binary_floats() -> None:
    values = np.linspace(0, 1, 12, dtype="<f4").reshape(2, 1, 2, 3)
    data, header = binary(values, datatype="FP32")
    images = images_of(data, header)
    assert images.dtype == np.float32
    assert np.array_equal(images, values)


BAD_INPUTS: list[tuple[dict[str, Any], str]] = [
    (tensor(name="image"), "inputs.0.name: must be 'images', got 'image'"),
    (tensor(name=None), "inputs.0.name: Field required"),
    (tensor(name=3), "inputs.0.name: "),
    (tensor(datatype="INT8"), "inputs.0.datatype: 'images' must be UINT8 or FP32, got 'INT8'"),
    (
        tensor(shape=[1, 2, 3]),
        "inputs.0.shape: 'images' must be [B, 1, 2, 3] with B >= 1, got [1, 2, 3]",
    ),
    (tensor(shape=[1, 1, 3, 2]), "inputs.0.shape: 'images' must be"),
    (tensor(shape=[0, 1, 2, 3]), "inputs.0.shape: 'images' must be"),
    (tensor(shape=[-1, 1, 2, 3]), "inputs.0.shape: 'images' must be"),
    (tensor(shape=[]), "inputs.0.shape: 'images' must be"),
    (tensor(shape=[5, 1, 2, 3]), "inputs.0.shape: at most 4 queries, got 5"),
    (tensor(shape=[10**30, 1, 2, 3]), "inputs.0.shape: at most 4 queries"),
    (tensor(shape=[1.0, 1, 2, 3]), "inputs.0.shape.0: "),
    (tensor(shape=[True, 1, 2, 3]), "inputs.0.shape.0: "),
    (tensor(shape="1123"), "inputs.0.shape: "),
    (tensor(parameters=[]), "inputs.0.parameters: "),
    (
        tensor(parameters={"shared_memory_region": "x"}),
        "inputs.0.parameters: shared memory is not supported",
    ),
    (tensor(data=None), "inputs.0.data: missing, and there is no binary data"),
    (tensor(data="AAAA"), "inputs.0.data: "),
    (tensor(data=[1, 2, 3]), "inputs.0.data: has shape [3], not [1, 1, 2, 3]"),
    (tensor(data=[]), "inputs.0.data: has shape [0]"),
    (tensor(data=[[1, 2, 3], [4, 5, 6]]), "inputs.0.data: has shape [2, 3]"),
    (tensor(data=[[1, 2, 3], [4, 5]]), "inputs.0.data: its rows differ in length"),
    (tensor(data=[1, [2, 3], 4, 5, 6, 7]), "inputs.0.data: its rows differ in length"),
    (tensor(parameters={"binary_data_size": 6}), "inputs.0.data: there is binary data already"),
    *[
        (tensor(data=data), "inputs.0.data: UINT8 values must be whole numbers in 0..255")
        for data in (
            [0, 1, 2, 3, 4, 256],
            [0, 1, 2, 3, 4, 5.0],
            [0, 1, 2, 3, 2**63, -1],
        )
    ],
    *[
        (tensor(data=[0, 0, 0, 0, 0, value], datatype="FP32"), f"inputs.0.data: FP32 values {told}")
        for value, told in (
            (1.5, "must lie in 0..1, without NaN"),
            (-0.1, "must lie in 0..1, without NaN"),
            (1e39, "must be numbers up to 3.40282e+38"),
            (None, "must be numbers up to 3.40282e+38"),
        )
    ],
]


@pytest.mark.parametrize(("made", "message"), BAD_INPUTS, ids=[m[:60] for _, m in BAD_INPUTS])
def test_bad_inputs(made: dict[str, Any], message: str) -> None:
    with pytest.raises(BadRequest) as caught:
        parse(body(made))
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)


def test_messages_do_not_repeat_long_values() -> None:
    for made in (body(tensor(name="x" * 10_000)), body(tensor(datatype="x" * 10_000))):
        with pytest.raises(BadRequest) as caught:
            parse(made)
        assert len(str(caught.value)) < 300


def test_null_parameters_are_none() -> None:
    made = json.loads(body(tensor(parameters=None)))
    made["inputs"][0]["parameters"] = None
    made["parameters"] = None
    made["outputs"] = [{"name": "label", "parameters": None}]
    assert parse(json.dumps(made).encode()).parameters == {}


@pytest.mark.parametrize("value", [np.nan, np.inf, -0.01, 1.01])
def test_bad_binary_floats(value: float) -> None:
    values = np.zeros((1, 1, 2, 3), "<f4")
    values[0, 0, 1, 1] = value
    with pytest.raises(BadRequest, match=r"^inputs\.0\.data: FP32 values must lie in 0\.\.1"):
        parse(*binary(values, datatype="FP32"))


def test_unknown_keys_are_left_to_newer_clients() -> None:
    assert images_of(body({**tensor(), "more": 1}, more=2)).shape == (1, 1, 2, 3)


# Parameters and outputs


def test_parameters() -> None:
    given = {"accept_decoded": False, "timeout": 1_500_000, "more": {"x": [1, None]}}
    request = parse(body(id="q1", parameters=given))
    assert request.identity == "q1"
    assert request.parameters == given
    assert not request.accept_decoded
    assert request.timeout == pytest.approx(1.5)


@pytest.mark.parametrize(
    ("parameters", "unknown"),
    [
        ({"accept_decoded": True, "timeout": 5, "priority": 1}, ()),
        ({"content_type": "np", "binary_data_output": False, "more": None}, ()),
        ({"sequence_id": 0, "sequence_start": False}, ()),
        ({"content_type": "str"}, ("content_type",)),
        ({"threshold": 0, "sequence_id": 7}, ("threshold", "sequence_id")),
    ],
)
def test_parameters_that_only_another_server_may_know(
    parameters: dict[str, Any], unknown: tuple[str, ...]
) -> None:
    """What clients write by default is none."""
    assert parse(body(parameters=parameters)).unknown == unknown


def test_those_of_inputs_and_outputs_count_as_well() -> None:
    output = {"name": "label", "parameters": {"binary_data": False, "top": 5}}
    made = tensor(parameters={"content_type": "np", "dictionary": "a"})
    assert parse(body(made, outputs=[output])).unknown == ("dictionary", "top")


@pytest.mark.parametrize("timeout", [0, -1, "5", True, [5], 0.0])
def test_bad_timeouts(timeout: Any) -> None:
    with pytest.raises(BadRequest, match=r"^parameters\.timeout: must be microseconds above 0"):
        parse(body(parameters={"timeout": timeout}))


def test_a_timeout_beyond_all_bounds() -> None:
    assert parse(body(parameters={"timeout": 10**400})).timeout == pytest.approx(1e6)
    assert parse(body(parameters={"timeout": 0.5})).timeout == pytest.approx(5e-7)


@pytest.mark.parametrize("accept", [0, 1, "no", None, []])
def test_bad_accept_decoded(accept: Any) -> None:
    with pytest.raises(BadRequest, match=r"^parameters\.accept_decoded: must be true or false"):
        parse(body(parameters={"accept_decoded": accept}))


def test_parameters_that_cannot_be_repeated() -> None:
    data = body(parameters={"x": 7}).replace(b"7}", b"1e999}")
    with pytest.raises(BadRequest, match=r"^parameters: "):
        parse(data)


def test_parameters_that_are_too_long() -> None:
    room = MOST_PARAMETERS - len('{"x": ""}')
    assert parse(body(parameters={"x": "y" * room})).parameters
    with pytest.raises(BadRequest, match=r"^parameters: more than 65536 characters$"):
        parse(body(parameters={"x": "y" * (room + 1)}))


def test_the_outputs_that_are_asked_for() -> None:
    label = {"name": "label"}
    outcome = {"name": "outcome", "parameters": {"binary_data": True}}
    probabilities = {"name": "probabilities", "parameters": {"binary_data": False}}
    assert parse(body(outputs=[outcome, label])).outputs == (("outcome", True), ("label", False))
    request = parse(body(outputs=[label, probabilities], parameters={"binary_data_output": True}))
    assert request.outputs == (("label", True), ("probabilities", False))
    with pytest.raises(BadRequest, match=r"^outputs\.1\.name: 'label' is"):
        parse(body(outputs=[label, label]))
    everything = parse(body(outputs=[], parameters={"binary_data_output": True})).outputs
    assert everything == (("probabilities", True), ("label", True), ("outcome", True))


@pytest.mark.parametrize(
    ("output", "message"),
    [
        (
            {"name": "logits"},
            "outputs.0.name: 'logits' is not one of probabilities, label, outcome",
        ),
        (
            {"name": "label", "parameters": {"binary_data": 1}},
            "outputs.0.parameters.binary_data: must be true or false",
        ),
        ({"name": "label", "parameters": {"classification": 2}}, "outputs.0.parameters: "),
        ({"name": "label", "parameters": {"shared_memory_region": "x"}}, "outputs.0.parameters: "),
    ],
)
def test_bad_outputs(output: dict[str, Any], message: str) -> None:
    with pytest.raises(BadRequest) as caught:
        parse(body(outputs=[output]))
    assert str(caught.value).startswith(message)
    with pytest.raises(BadRequest, match=r"^parameters\.binary_data_output: "):
        parse(body(outputs=[output], parameters={"binary_data_output": "yes"}))


# Responses


def test_no_answer_has_a_bare_nan() -> None:
    nothing = Response({**answered(1).outputs, "probabilities": np.full((1, 3), np.nan)}, 0.1)
    with pytest.raises(BadRequest, match=r"^outputs: 'probabilities': .*: ask for binary_data$"):
        render_response(parse(body()), nothing, MODEL)


def test_a_json_response() -> None:
    request = parse(body(id="q1", parameters={"timeout": 5}))
    data, head = render_response(request, answered(2), MODEL)
    assert head is None
    assert json.loads(data) == {
        "model_name": "mnist",
        "model_version": "1",
        "id": "q1",
        "parameters": {"timeout": 5},
        "outputs": [
            {
                "name": "probabilities",
                "datatype": "FP32",
                "shape": [2, 3],
                "data": [0.25, 0.5, 0.25, 0.125, 0.125, 0.75],
            },
            {"name": "label", "datatype": "INT64", "shape": [2], "data": [1, 2]},
            {"name": "outcome", "datatype": "BYTES", "shape": [2], "data": ["direct", "decoded"]},
        ],
    }


def test_a_binary_response() -> None:
    data, head = render_response(
        parse(body(parameters={"binary_data_output": True})), answered(2), MODEL
    )
    assert head is not None
    outputs = json.loads(data[:head])["outputs"]
    sizes = [output["parameters"]["binary_data_size"] for output in outputs]
    assert all("data" not in output for output in outputs)
    assert sizes == [24, 16, 6 + 7 + 8]
    assert len(data) == head + sum(sizes)
    blobs = data[head:]
    assert np.frombuffer(blobs[:24], "<f4").tolist() == [0.25, 0.5, 0.25, 0.125, 0.125, 0.75]
    assert np.frombuffer(blobs[24:40], "<i8").tolist() == [1, 2]
    assert blobs[40:] == b"\x06\0\0\0direct\x07\0\0\0decoded"


def test_a_mixed_response_has_what_was_asked_for_in_its_order() -> None:
    asked = [
        {"name": "outcome", "parameters": {"binary_data": True}},
        {"name": "label"},
    ]
    data, head = render_response(parse(body(outputs=asked)), answered(1), MODEL)
    assert head is not None
    reply = json.loads(data[:head])
    assert set(reply) == {"model_name", "model_version", "outputs"}
    outcome, label = reply["outputs"]
    assert (outcome["name"], outcome["shape"], label["data"]) == ("outcome", [1], [1])
    assert data[head:] == b"\x06\0\0\0direct"


def test_metadata() -> None:
    assert server_metadata("1.2") == {
        "name": "codedinvnet",
        "version": "1.2",
        "extensions": ["binary_tensor_data"],
    }
    made = model_metadata(MODEL)
    assert made["inputs"] == [{"name": "images", "datatype": "UINT8", "shape": [-1, 1, 2, 3]}]
    assert made["outputs"][0] == {"name": "probabilities", "datatype": "FP32", "shape": [-1, 3]}
    assert [output["shape"] for output in made["outputs"]] == [[-1, 3], [-1], [-1]]


# A model of several tensors

OWN = OwnModel(
    "own",
    Signature(
        inputs=(TensorSpec("tokens", "INT32", (3,)), TensorSpec("text", "BYTES", ())),
        outputs=(TensorSpec("scores", "FP64", (2,)), TensorSpec("outcome", "BOOL", ())),
        platform="onnxruntime_onnx",
    ),
)


TOKENS = {"name": "tokens", "shape": [2, 3], "datatype": "INT32", "data": [1, 2, 3, 4, 5, -6]}


TEXT = {"name": "text", "shape": [2], "datatype": "BYTES", "data": ["a", "ä"]}


def own(*tensors: dict[str, Any], tail: bytes = b"") -> Request:
    head = json.dumps({"inputs": tensors}).encode()
    return parse(head + tail, str(len(head)) if tail else None, OWN)


def in_binary(made: dict[str, Any], size: int) -> dict[str, Any]:
    plain = {key: value for key, value in made.items() if key != "data"}
    return {**plain, "parameters": {"binary_data_size": size}}


def test_inputs_come_in_any_order_in_json_and_in_binary() -> None:
    text = b"\1\0\0\0a\2\0\0\0\xc3\xa4"
    tokens = np.array(TOKENS["data"], "<i4").tobytes()
    for request in (
        own(TOKENS, TEXT),
        own(TEXT, TOKENS),
        own(in_binary(TEXT, len(text)), in_binary(TOKENS, 24), tail=text + tokens),
        own(TOKENS, in_binary(TEXT, len(text)), tail=text),
    ):
        assert list(request.inputs) == ["tokens", "text"]
        assert request.inputs["tokens"].tolist() == [[1, 2, 3], [4, 5, -6]]
        assert request.inputs["text"].tolist() == [b"a", b"\xc3\xa4"]
        assert [query["text"].tolist() for query in request.queries()] == [[b"a"], [b"\xc3\xa4"]]
        assert request.outputs == tuple((name, False) for name in ALL_OWN)


ALL_OWN = ("scores", "outcome", "codedinvnet.outcome")


@pytest.mark.parametrize(
    ("tensors", "tail", "message"),
    [
        ([TOKENS], b"", "inputs: the model takes 2 ('tokens', 'text'), got 1"),
        ([TOKENS, TOKENS], b"", "inputs.1.name: 'tokens' is there twice"),
        (
            [TOKENS, {**TEXT, "name": "texts"}],
            b"",
            "inputs.1.name: must be 'tokens', 'text', got 'texts'",
        ),
        (
            [TOKENS, {**TEXT, "datatype": "FP32"}],
            b"",
            "inputs.1.datatype: 'text' must be BYTES, got 'FP32'",
        ),
        (
            [TOKENS, {**TEXT, "shape": [2, 1]}],
            b"",
            "inputs.1.shape: 'text' must be [B] with B >= 1, got [2, 1]",
        ),
        (
            [TOKENS, {**TEXT, "shape": [1], "data": ["a"]}],
            b"",
            "inputs.1.shape: 'text' has 1 queries, 'tokens' has 2",
        ),
        ([TOKENS, in_binary(TEXT, 9)], bytes(8), "body: 8 bytes are left for inputs.1; its"),
        ([TOKENS, in_binary(TEXT, 8)], bytes(9), "body: 9 bytes follow the JSON part, but more"),
        ([TOKENS, in_binary(TEXT, 5)], b"\1\0\0\0a", "inputs.1.data: has 1 elements of BYTES"),
        ([in_binary(TOKENS, 23), TEXT], bytes(23), "inputs.0.parameters.binary_data_size: 23"),
    ],
)
def test_what_is_wrong_with_one_of_several_inputs(
    tensors: list[dict[str, Any]], tail: bytes, message: str
) -> None:
    with pytest.raises(BadRequest) as caught:
        own(*tensors, tail=tail)
    assert str(caught.value).startswith(message)


def test_bytes_that_are_no_text_are_refused_where_texts_are_taken() -> None:
    tail = b"\1\0\0\0a\2\0\0\0\xff\xfe"
    tensors = (TOKENS, in_binary(TEXT, len(tail)))
    assert own(*tensors, tail=tail).inputs["text"].tolist() == [b"a", b"\xff\xfe"]
    head = json.dumps({"inputs": tensors}).encode()
    with pytest.raises(BadRequest, match=r"^inputs\.1\.data: element 1 must be text in UTF-8"):
        parse(head + tail, str(len(head)), replace(OWN, texts=True))


def test_outputs_of_any_datatype() -> None:
    outcomes = np.array([b"direct", b"direct"], object)
    outputs = {"scores": np.eye(2), "outcome": np.array([True, False]), ALL_OWN[2]: outcomes}
    data, _ = render_response(own(TOKENS, TEXT), Response(outputs, 0.0), OWN)
    assert json.loads(data)["outputs"] == [
        {"name": "scores", "datatype": "FP64", "shape": [2, 2], "data": [1, 0, 0, 1]},
        {"name": "outcome", "datatype": "BOOL", "shape": [2], "data": [True, False]},
        {"name": ALL_OWN[2], "datatype": "BYTES", "shape": [2], "data": ["direct", "direct"]},
    ]


def test_metadata_of_any_model() -> None:
    made = model_metadata(OWN)
    assert made["platform"] == "onnxruntime_onnx"
    assert made["inputs"] == [
        {"name": "tokens", "datatype": "INT32", "shape": [-1, 3]},
        {"name": "text", "datatype": "BYTES", "shape": [-1]},
    ]
    assert [output["name"] for output in made["outputs"]] == list(ALL_OWN)


@pytest.mark.parametrize("limit", [0, 1, -0.1, "0.1", True, [0.1]])
def test_a_limit_on_disagreement_lies_between_0_and_1(limit: Any) -> None:
    with pytest.raises(BadRequest, match="max_disagreement"):
        parse(body(parameters={"max_disagreement": limit}))
    assert parse(body(parameters={"max_disagreement": 0.01})).max_disagreement == 0.01
