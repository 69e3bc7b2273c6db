from __future__ import annotations

import gzip
import json
import math
import time
import tracemalloc
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from codedinvnet.models.base import Signature, TensorSpec
from codedinvnet.serving.answers import BadRequest
from codedinvnet.serving.faces.v2 import (
    JSON_VALUES,
    MOST_PARAMETERS,
    InferBody,
    TooLarge,
    decompress,
    json_bytes,
    model_metadata,
    parse_request,
    render_response,
    server_metadata,
    split_body,
)
from codedinvnet.serving.served import Classifier, OwnModel, Served
from codedinvnet.serving.service import Request, Response

MODEL = Classifier("mnist", (1, 2, 3), ("cat", "dog", "bird"))
PIXELS = [[[[0, 1, 2], [3, 4, 255]]]]
"""One image."""


@contextmanager
def at_most(limit: int) -> Iterator[None]:
    """Let the body take at most so many bytes of memory at a time."""
    tracemalloc.start()
    try:
        yield
        assert tracemalloc.get_traced_memory()[1] < limit
    finally:
        tracemalloc.stop()


def tensor(**changes: Any) -> dict[str, Any]:
    """Return a good input with changes; None leaves a key out."""
    made = {"name": "images", "shape": [1, 1, 2, 3], "datatype": "UINT8", "data": PIXELS, **changes}
    return {key: value for key, value in made.items() if value is not None}


def body(made: dict[str, Any] | None = None, **top: Any) -> bytes:
    return json.dumps({"inputs": [tensor() if made is None else made], **top}).encode()


def parse(data: bytes, header: str | None = None, served: Served = MODEL) -> Request:
    return parse_request(data, header, served, 4)


def images_of(data: bytes, header: str | None = None) -> np.ndarray:
    return parse(data, header).inputs["images"]


def binary(values: np.ndarray, *, datatype: str, **changes: Any) -> tuple[bytes, str]:
    """Return a body with binary data, and its header."""
    blob = values.tobytes()
    made = tensor(
        data=None,
        datatype=datatype,
        shape=list(values.shape),
        parameters={"binary_data_size": len(blob)},
    )
    head = body({**made, **changes})
    return head + blob, str(len(head))


# Content-Encoding


@pytest.mark.parametrize("encoding", [None, "", "identity", "Identity"])
def test_a_plain_body_is_left_alone(encoding: str | None) -> None:
    assert decompress(b"abc", encoding, 3) == b"abc"


@pytest.mark.parametrize(
    ("encoding", "compress"),
    [("gzip", gzip.compress), ("GZIP", gzip.compress), ("deflate", zlib.compress)],
)
def test_compressed_bodies(encoding: str, compress: Callable[[bytes], bytes]) -> None:
    data = b"0123456789" * 100
    packed = compress(data)
    assert decompress(packed, encoding, 1000) == data
    assert decompress(compress(b""), encoding, 0) == b""
    with pytest.raises(BadRequest, match=r"^body: more than 999 bytes when decompressed$"):
        decompress(packed, encoding, 999)
    with pytest.raises(BadRequest, match=rf"^body: the {encoding.lower()} data is cut short$"):
        decompress(packed[:-1], encoding, 1000)
    with pytest.raises(BadRequest, match=rf"^body: the {encoding.lower()} data is cut short$"):
        decompress(b"", encoding, 1000)
    with pytest.raises(BadRequest, match=rf"^body: 3 bytes follow the {encoding.lower()} data$"):
        decompress(packed + b"abc", encoding, 1000)


def test_a_small_bomb_is_not_unpacked() -> None:
    bomb = gzip.compress(bytes(50_000_000))
    with at_most(1_000_000), pytest.raises(BadRequest, match="more than 1000 bytes"):
        decompress(bomb, "gzip", 1000)


@pytest.mark.parametrize("damaged", [b"hello", gzip.compress(b"hello", mtime=0)[:-8] + bytes(8)])
def test_damaged_gzip(damaged: bytes) -> None:
    with pytest.raises(BadRequest, match=r"^body: not valid gzip: "):
        decompress(damaged, "gzip", 1000)


def test_an_unknown_encoding() -> None:
    with pytest.raises(BadRequest, match=r"^Content-Encoding: 'br' is not supported"):
        decompress(b"abc", "br", 1000)


# Images


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


def test_long_strings_do_not_fill_the_memory() -> None:
    """As a numpy array of strings, these would take 2 GB."""
    model = Classifier("mnist", (1, 50, 100), ("cat",))
    data = ["x" * 100_000] + [""] * 4999
    made = body(tensor(shape=[1, 1, 50, 100], data=data))
    with at_most(50_000_000), pytest.raises(BadRequest, match="UINT8 values must be whole"):
        parse_request(made, None, model, 1)


def test_more_values_than_the_shape_are_refused_before_they_are_copied() -> None:
    with pytest.raises(BadRequest, match=r"has 7 elements, more than shape \[1, 1, 2, 3\] has"):
        parse(body(tensor(data=[0] * 7)))


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


def test_deep_nesting() -> None:
    data: list[Any] = [1]
    for _ in range(100):
        data = [data]
    with pytest.raises(BadRequest, match=r"^inputs\.0\.data: "):
        parse(body(tensor(data=data)))


@pytest.mark.parametrize("value", [np.nan, np.inf, -0.01, 1.01])
def test_bad_binary_floats(value: float) -> None:
    values = np.zeros((1, 1, 2, 3), "<f4")
    values[0, 0, 1, 1] = value
    with pytest.raises(BadRequest, match=r"^inputs\.0\.data: FP32 values must lie in 0\.\.1"):
        parse(*binary(values, datatype="FP32"))


@pytest.mark.parametrize("size", [5, 7, "6", None, -6, [6], 6.5])
def test_a_binary_size_that_disagrees_with_the_shape(size: Any) -> None:
    pixels = np.zeros((1, 1, 2, 3), np.uint8)
    data, header = binary(pixels, datatype="UINT8", parameters={"binary_data_size": size})
    with pytest.raises(BadRequest, match="binary_data_size"):
        parse(data, header)


def test_binary_data_that_disagrees_with_its_size() -> None:
    data, header = binary(np.zeros((1, 1, 2, 3), np.uint8), datatype="UINT8")
    for wrong in (data[:-1], data + b"\0"):
        with pytest.raises(BadRequest, match=r"^body: \d bytes (follow|are left for) "):
            parse(wrong, header)


def test_bytes_that_nobody_asked_for() -> None:
    head = body()
    with pytest.raises(BadRequest, match=r"^body: 4 bytes follow the JSON part, but no input has"):
        parse(head + b"abcd", str(len(head)))
    with pytest.raises(BadRequest, match=r"^body: not valid JSON"):
        parse(head + b"abcd")


@pytest.mark.parametrize("header", ["-1", "", "x", "1.0", " 3", "²", "9" * 30, "9" * 5000])
def test_bad_header_lengths(header: str) -> None:
    with pytest.raises(BadRequest, match=r"^Inference-Header-Content-Length: must be a number"):
        split_body(b"abc", header)


def test_split_body() -> None:
    for header, parts in ((None, [b"abc", b""]), ("2", [b"ab", b"c"]), ("3", [b"abc", b""])):
        assert list(map(bytes, split_body(b"abc", header))) == parts
    with pytest.raises(BadRequest, match="4 is more than the body's 3 bytes"):
        split_body(b"abc", "4")


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "body: not valid JSON"),
        (b"{", "body: not valid JSON"),
        (b"\xff\xfe\xfd", "body: not valid JSON"),
        (b"[" * 10_000, "body: not valid JSON"),
        (b"9" * 5000, "body: not valid JSON"),
        (b'{"inputs": [NaN]}', "body: not valid JSON"),
        (b'{"id": "\\ud800"}', "body: not valid JSON"),
        (b"[]", "body: must be a JSON object"),
        (b"{}", "inputs: Field required"),
        (b'{"inputs": {}}', "inputs: "),
        (b'{"inputs": [3]}', "inputs.0: "),
        (b'{"inputs": []}', "inputs: the model takes 1 ('images'), got 0"),
        (body(inputs=[tensor(), tensor()]), "inputs: the model takes 1 ('images'), got 2"),
        (body(id=3), "id: "),
        (body(parameters=3), "parameters: "),
        (body(outputs=3), "outputs: "),
        (body(outputs=[{}]), "outputs.0.name: Field required"),
    ],
)
def test_bad_json(data: bytes, message: str) -> None:
    with pytest.raises(BadRequest) as caught:
        parse(data)
    assert str(caught.value).startswith(message)


LONG_SHAPE = "inputs.0.shape: at most 4 numbers, got "


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (
            json.dumps({"inputs": [0] * 1000}).encode(),
            "inputs: the model takes 1 ('images'), got 1000",
        ),
        (body(outputs=[0] * 1000), "outputs: the model has 3, got 1000"),
        (body(tensor(shape=[1, 1, 1, 2, 3])), LONG_SHAPE + "[1, 1, 1, 2, 3]"),
        (body(tensor(shape=["x"] * 1000)), LONG_SHAPE + "['x', 'x'"),
    ],
    ids=["inputs", "outputs", "shape", "long shape"],
)
def test_long_lists_are_refused_before_each_element_is_an_error(
    data: bytes, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(InferBody, "model_validate", None)
    with pytest.raises(BadRequest) as caught:
        parse(data)
    assert str(caught.value).startswith(message)
    assert len(str(caught.value)) < 300


def test_a_large_image_is_read_as_json() -> None:
    """Its lists, of one image as of many small ones, are within the bounds."""
    for shape in ((3, 600, 600), (5, 3, 4)):
        model = Classifier("m", shape, ("a",))
        count = max(1, JSON_VALUES // math.prod(shape))
        pixels = np.zeros((count, *shape), int).tolist()
        made = body(tensor(shape=[count, *shape], data=pixels, datatype="FP32"), id="x,[:" * 1000)
        found = parse_request(made, None, model, count)
        assert found.inputs["images"].shape == (count, *shape)


@pytest.mark.parametrize(
    "unit",
    [
        b"[],",
        b"[[[]]],",
        b"{},",
        b'{"a":{}},',
        b"0,",
        b'"a":0,',
        b'"' + b"x" * 50 + b'",',
        b"," * 9,
    ],
)
def test_json_that_takes_long_to_read_is_not_read(unit: bytes) -> None:
    """25 MB come of 49 KB of gzip; read, they stop the event loop for seconds."""
    bomb = b'{"inputs": [' + unit * (25_000_000 // len(unit)) + b"0]}"
    began = time.process_time()
    with at_most(1_000_000), pytest.raises(TooLarge, match=r"^body: more than"):
        parse(bomb)
    smaller = bomb[: json_bytes(MODEL) - 10] + b"0]}"
    with at_most(60_000_000), pytest.raises(BadRequest):
        parse(smaller)
    assert time.process_time() - began < 1


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


def answered(rows: int) -> Response:
    """Return a response with the first so many rows of these."""
    outputs: dict[str, np.ndarray] = {
        "probabilities": np.array([[0.25, 0.5, 0.25], [0.125, 0.125, 0.75]] * 2, np.float32),
        "label": np.array([1, 2] * 2, np.int64),
        "outcome": np.array([b"direct", b"decoded"] * 2, object),
    }
    return Response({name: values[:rows] for name, values in outputs.items()}, 0.1)


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


# Anything at all

JSON: st.SearchStrategy[Any] = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=3),
    lambda part: (
        st.lists(part, max_size=4) | st.dictionaries(st.text(max_size=3), part, max_size=3)
    ),
    max_leaves=8,
)


def or_anything(*good: Any) -> st.SearchStrategy[Any]:
    return st.sampled_from(good) | JSON


TENSORS = st.fixed_dictionaries(
    {
        "name": or_anything("images"),
        "shape": or_anything([1, 1, 2, 3], [2, 1, 2, 3]),
        "datatype": or_anything("UINT8", "FP32"),
    },
    optional={
        "data": or_anything(PIXELS, [0, 0, 1, 1, 0, 1]) | st.lists(JSON, min_size=6, max_size=6),
        "parameters": or_anything({"binary_data_size": 6}, {"binary_data_size": 48}),
    },
)
BODIES = st.fixed_dictionaries(
    {"inputs": st.lists(TENSORS, min_size=1, max_size=1) | JSON},
    optional={
        "id": or_anything("q"),
        "parameters": st.dictionaries(
            st.sampled_from(["accept_decoded", "timeout", "binary_data_output"]), JSON
        )
        | JSON,
        "outputs": or_anything([{"name": "label"}])
        | st.lists(st.fixed_dictionaries({"name": or_anything("label"), "parameters": JSON})),
    },
)


def answer_or_refuse(data: bytes, header: str | None) -> None:
    """Answer a request; nothing but `BadRequest` may be raised."""
    try:
        request = parse(data, header)
    except BadRequest:
        return
    images = request.inputs["images"]
    assert images.shape[1:] == MODEL.image_shape
    assert images.dtype in (np.uint8, np.float32)
    rendered, head = render_response(request, answered(len(images)), MODEL)

    def no_constant(name: str) -> float:
        raise AssertionError(name)

    json.loads(rendered[:head], parse_constant=no_constant)


@settings(max_examples=200, deadline=None)
@given(data=st.binary(max_size=60), header=st.none() | st.text(max_size=4) | st.just("2"))
def test_random_bytes_are_refused(data: bytes, header: str | None) -> None:
    with pytest.raises(BadRequest):
        parse(data, header)


@settings(max_examples=200, deadline=None)
@given(
    data=st.binary(max_size=60),
    encoding=st.none() | st.sampled_from(["gzip", "deflate", "br", ""]) | st.text(max_size=4),
    packed=st.booleans(),
    cut=st.integers(0, 5),
)
def test_random_compressed_bytes(data: bytes, encoding: str | None, packed: bool, cut: int) -> None:
    sent = gzip.compress(data) if packed else data
    try:
        found = decompress(sent[: len(sent) - cut], encoding, 40)
    except BadRequest:
        return
    assert found in (data, sent[: len(sent) - cut])


@settings(max_examples=300, deadline=None)
@given(made=BODIES, tail=st.binary(max_size=7), whole=st.booleans())
def test_almost_right_requests(made: dict[str, Any], tail: bytes, whole: bool) -> None:
    head = json.dumps(made).encode()
    answer_or_refuse(head if whole else head + tail, None if whole else str(len(head)))


@pytest.mark.parametrize("limit", [0, 1, -0.1, "0.1", True, [0.1]])
def test_a_limit_on_disagreement_lies_between_0_and_1(limit: Any) -> None:
    with pytest.raises(BadRequest, match="max_disagreement"):
        parse(body(parameters={"max_disagreement": limit}))
    assert parse(body(parameters={"max_disagreement": 0.01})).max_disagreement == 0.01
