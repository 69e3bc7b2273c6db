"""Requests and responses survive each of the protocol's forms; what is not one is refused."""

from __future__ import annotations

import gzip
import json
import math
import time
import zlib
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tritonclient.grpc import service_pb2 as pb

from codedinvnet.net.protocol import grpc, http
from codedinvnet.net.protocol.messages import (
    HEADER_LENGTH,
    MOST_PARAMETERS,
    InferRequest,
    InferResponse,
    Limits,
    Metadata,
    ProtocolError,
    RequestedOutput,
    TooLarge,
)
from codedinvnet.net.protocol.tensors import TensorSpec, datatype_of, to_bytes
from tests.net.protocol.test_tensors import tensors

NAMES = st.sampled_from(["x", "y", "images", "ä"])


def as_message(request: InferRequest) -> bytes:
    """Return a request as a client over gRPC writes it."""
    message = pb.ModelInferRequest(id=request.id or "")
    for name, value in request.parameters.items():
        kind = {bool: "bool", int: "int64", float: "double", str: "string"}[type(value)]
        setattr(message.parameters[name], f"{kind}_param", value)
    for name, array in request.inputs.items():
        message.inputs.add(name=name, datatype=datatype_of(array), shape=array.shape)
        message.raw_input_contents.append(to_bytes(array))
    for output in request.outputs:
        message.outputs.add(name=output.name)
    serialized: bytes = message.SerializeToString()
    return serialized


TEXTS = st.text(max_size=6).map(str.encode)
TENSORS = st.dictionaries(NAMES, tensors(TEXTS, fewest=0), min_size=1, max_size=3)
PARAMETERS = st.dictionaries(
    st.sampled_from(["priority", "timeout", "own"]),
    st.booleans() | st.integers(-(2**63), 2**63 - 1) | st.text(max_size=5) | st.just(0.25),
)
REQUESTS = st.builds(
    InferRequest,
    TENSORS,
    st.none() | st.text(min_size=1, max_size=5),
    PARAMETERS,
    st.lists(
        st.builds(RequestedOutput, NAMES, st.just(True)), max_size=2, unique_by=lambda o: o.name
    ).map(tuple),
    st.just(True),
)
RESPONSES = st.builds(
    InferResponse,
    TENSORS,
    NAMES,
    st.sampled_from(["", "1"]),
    st.none() | st.text(min_size=1, max_size=5),
    PARAMETERS,
)


def told(message: InferRequest | InferResponse) -> Any:
    """Return what a message says, for comparisons."""
    ours = message.inputs if isinstance(message, InferRequest) else message.outputs
    tensors = [(name, datatype_of(a), a.shape, to_bytes(a)) for name, a in ours.items()]
    parameters = {k: v for k, v in message.parameters.items() if k != http.ALL_BINARY}
    rest: tuple[Any, ...] = (message.id, parameters)
    if isinstance(message, InferRequest):
        rest += ([(o.name, o.binary) for o in message.outputs], message.binary)
    return tensors, rest


@settings(max_examples=100, deadline=None)
@given(request=REQUESTS, binary=st.booleans(), coding=st.sampled_from([None, "gzip", "deflate"]))
def test_requests_survive_each_form(
    request: InferRequest, binary: bool, coding: str | None
) -> None:
    body = http.render_request(request, binary=binary)
    data = body.data
    if coding is not None:
        data = gzip.compress(data) if coding == "gzip" else zlib.compress(data)
    length = body.headers.get(HEADER_LENGTH)
    assert told(http.parse_request(data, length, coding)) == told(request)
    assert told(grpc.parse_request(as_message(request))) == told(request)


@settings(max_examples=100, deadline=None)
@given(response=RESPONSES, binary=st.booleans())
def test_responses_survive_each_form(response: InferResponse, binary: bool) -> None:
    body = http.render_response(response, InferRequest({}, binary=binary))
    found = http.parse_response(body.data, body.headers.get(HEADER_LENGTH))
    assert told(found) == told(response)
    message = pb.ModelInferResponse.FromString(grpc.render_response(response))
    assert (message.model_name, message.id) == (response.model_name, response.id or "")
    entries = zip(message.outputs, message.raw_output_contents, strict=True)
    assert [(o.name, o.datatype, tuple(o.shape), raw) for o, raw in entries] == told(response)[0]


def tensor(**changes: Any) -> dict[str, Any]:
    made = {"name": "x", "shape": [1, 2], "datatype": "UINT8", "data": [1, 2], **changes}
    return {key: value for key, value in made.items() if value is not None}


def head(*inputs: Any, **more: Any) -> bytes:
    return json.dumps({"inputs": list(inputs) or [tensor()], **more}).encode()


SIZED = {"binary_data_size": 2}
BAD: list[tuple[bytes, str]] = [
    (b"", "body: not valid JSON"),
    (b"\xff", "body: not valid JSON"),
    (b"[]", "body: must be a JSON object"),
    (b'{"inputs": [NaN]}', "body: not valid JSON"),
    (b"[" * 100_000, "body: "),
    (b"{}", "inputs: missing"),
    (b'{"inputs": 3}', "inputs: must be a list"),
    (head(3), "inputs.0: must be an object"),
    (head(tensor(name=None)), "inputs.0.name: must be a string"),
    (head(tensor(datatype="BF16")), "inputs.0.datatype: 'BF16' is not supported"),
    (head(tensor(shape=[1.0, 2])), "inputs.0.shape: must be a list of sizes"),
    (head(tensor(shape=[-1, 2])), "inputs.0.shape: must be a list of sizes"),
    (head(tensor(shape=[True, 2])), "inputs.0.shape: must be a list of sizes"),
    (head(tensor(shape=[1] * 99)), "inputs.0.shape: must be a list of sizes"),
    (head(tensor(data=None)), "inputs.0.data: missing, and there is no binary data"),
    (head(tensor(data="AA")), "inputs.0.data: must be a list"),
    (head(tensor(data=[1])), "inputs.0.data: has shape [1], not [1, 2]"),
    (head(tensor(data=[[[1, 2]]])), "inputs.0.data: has shape [1, 1, 2], not [1, 2]"),
    (head(tensor(data=[1, 256])), "inputs.0.data: UINT8 values must be whole numbers in 0..255"),
    (head(tensor(parameters=[])), "inputs.0.parameters: must be an object"),
    (head(tensor(parameters=SIZED)), "inputs.0.data: there is binary data already"),
    (head(tensor(data=None, parameters=SIZED)), "inputs.0.parameters.binary_data_size: needs"),
    (head(tensor(), tensor()), "inputs.1.name: 'x' is there twice"),
    (head(id=3), "id: must be a string"),
    (head(parameters=[]), "parameters: must be an object"),
    (head(parameters={"a": [[]] * 9, "binary_data_output": 1}), "parameters.binary_data_output:"),
    (head(parameters={"a": "x" * MOST_PARAMETERS}), "parameters: more than"),
    (head(outputs=[{}]), "outputs.0.name: must be a string"),
    (head(outputs=[{"name": "y"}] * 2), "outputs.1.name: 'y' is there twice"),
    (head(outputs=[{"name": "y", "parameters": {"binary_data": 1}}]), "outputs.0.parameters."),
]


@pytest.mark.parametrize(("body", "message"), BAD)
def test_bodies_that_are_no_request(body: bytes, message: str) -> None:
    with pytest.raises(ProtocolError) as caught:
        http.parse_request(body, limits=Limits.of([TensorSpec("x", "UINT8", (2,))], 4, 1 << 20))
    assert str(caught.value).startswith(message)
    assert len(str(caught.value)) < 400


def test_parameters_that_nest_deeply() -> None:
    deep: Any = 1
    for _ in range(40):
        deep = [deep]
    with pytest.raises(ProtocolError, match=r"^parameters: nested more than 32 deep"):
        http.parse_request(head(parameters={"a": deep}))


def binary(pixels: np.ndarray, **changes: Any) -> tuple[bytes, str]:
    sized = {"binary_data_size": pixels.nbytes, **changes}
    made = tensor(data=None, shape=list(pixels.shape), parameters=sized)
    return head(made) + pixels.tobytes(), str(len(head(made)))


@pytest.mark.parametrize("wrong", ["x", "-1", "9" * 19, "99999", "", "٣"])
def test_header_lengths_that_are_none(wrong: str) -> None:
    data, _ = binary(np.zeros((1, 2), np.uint8))
    with pytest.raises(ProtocolError):
        http.parse_request(data, wrong)


@pytest.mark.parametrize("size", [1, 3, "2", None, -2, [2], 2.0, True])
def test_binary_sizes_that_disagree_with_the_shape(size: Any) -> None:
    data, length = binary(np.zeros((1, 2), np.uint8), binary_data_size=size)
    with pytest.raises(ProtocolError, match="binary_data_size"):
        http.parse_request(data, length)


def test_tails_that_disagree_with_the_head() -> None:
    data, length = binary(np.zeros((1, 2), np.uint8))
    for wrong in (data[:-1], data + b"\0"):
        with pytest.raises(ProtocolError, match=r"^body: \d bytes follow the JSON part"):
            http.parse_request(wrong, length)
        with pytest.raises(ProtocolError, match=r"^body: "):
            http.parse_request(gzip.compress(wrong), length, "gzip")


@pytest.mark.parametrize("coding", ["gzip", "deflate"])
def test_compressed_bodies_that_are_damaged(coding: str) -> None:
    data = gzip.compress(head()) if coding == "gzip" else zlib.compress(head())
    assert http.parse_request(data, None, coding.upper()).inputs["x"].tolist() == [[1, 2]]
    for wrong, message in (
        (data[:-1], "is cut short"),
        (b"", "is cut short"),
        (data + b"abc", "3 bytes follow the"),
        (b"hello", "not valid"),
    ):
        with pytest.raises(ProtocolError, match=message):
            http.parse_request(wrong, None, coding)
    with pytest.raises(ProtocolError, match=r"^Content-Encoding: 'br' is not supported"):
        http.parse_request(data, None, "br")


def test_no_more_is_inflated_than_a_request_may_have() -> None:
    """A body of 150 KB that inflates to 150 MB is refused before it takes memory or time."""
    bomb = gzip.compress(head(tensor(data=None, parameters=SIZED)) + bytes(150_000_000), 9)
    length = str(len(head(tensor(data=None, parameters=SIZED))))

    def seconds(do: Callable[[], object]) -> float:
        began = time.process_time()
        do()
        return time.process_time() - began

    whole = seconds(lambda: gzip.decompress(bomb))
    for header, limits in ((length, Limits(body=1000)), (None, Limits(head=1000))):

        def refuse(header: str | None = header, limits: Limits = limits) -> None:
            with pytest.raises(TooLarge, match=r"more than \d+ bytes when decompressed"):
                http.parse_request(bomb, header, "gzip", limits)

        assert seconds(refuse) < whole / 5


def test_a_request_of_texts_takes_a_batch_of_long_ones_and_not_much_more() -> None:
    """JSON is read in one go, in which no other thread has a turn: 60 MiB would take 300 ms."""
    limits = Limits.of([TensorSpec("text", "BYTES", ())], 256, 1 << 40)
    texts = ["a" * 4096] * 256
    body = head(tensor(datatype="BYTES", shape=[256], data=texts))
    assert list(http.parse_request(body, limits=limits).inputs["x"]) == [b"a" * 4096] * 256
    assert limits.head < 8 << 20


def test_limits_follow_from_a_model() -> None:
    image = TensorSpec("images", "UINT8", (3, 224, 224))
    limits = Limits.of([image], 256, 1 << 40)
    assert 256 * 4 * 3 * 224 * 224 <= limits.body < 1.1 * 256 * 4 * 3 * 224 * 224
    assert Limits.of([image], 256, 1 << 20).body == 1 << 20
    http.parse_request(head(tensor(data=[0] * 150528, shape=[1, 150528])), limits=limits)
    for hostile in (
        b'{"inputs": [' + b"0," * limits.values,
        b'{"inputs": ' + b"[" * limits.values,
        b" " * (limits.head + 1),
    ):
        with pytest.raises(TooLarge, match="of JSON; send binary tensors"):
            http.parse_request(hostile, limits=limits)


def test_what_json_cannot_carry_is_refused() -> None:
    answer = InferResponse({"y": np.array([math.nan], np.float32)}, "m")
    with pytest.raises(ProtocolError, match=r"^outputs: 'y': .*: ask for binary_data$"):
        http.render_response(answer, InferRequest({}))
    assert http.render_response(answer, InferRequest({}, binary=True)).header_length


@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_nothing_but_a_refusal_comes_of_a_damaged_message(data: st.DataObject) -> None:
    body = http.render_request(InferRequest({"x": np.array([[1, 2]], np.int16)}, "7"))
    message = as_message(InferRequest({"x": np.array([[1, 2]], np.int16)}, "7"))
    for text, length in ((body.data, str(body.header_length)), (message, "")):
        place = data.draw(st.integers(0, len(text) - 1))
        garbage = data.draw(st.binary(max_size=4))
        damaged = text[:place] + garbage + text[place + data.draw(st.integers(0, 3)) :]
        try:
            if length:
                http.parse_request(damaged, length)
                http.parse_response(damaged, length)
            else:
                grpc.parse_request(damaged)
        except ProtocolError:
            pass


TYPED = [
    ("BOOL", "bool_contents", [True, False]),
    ("UINT8", "uint_contents", [1, 255]),
    ("INT64", "int64_contents", [-1, 2**62]),
    ("FP32", "fp32_contents", [0.5, 1.0]),
    ("BYTES", "bytes_contents", [b"a", b""]),
]


@pytest.mark.parametrize(("datatype", "field", "values"), TYPED)
def test_typed_contents(datatype: str, field: str, values: list[Any]) -> None:
    message = pb.ModelInferRequest(model_name="m")
    entry = message.inputs.add(name="x", datatype=datatype, shape=[2])
    getattr(entry.contents, field).extend(values)
    found = grpc.parse_request(message.SerializeToString())
    assert found.inputs["x"].tolist() == values
    assert (found.model_name, found.id) == ("m", None)


def message_of(**changes: Any) -> pb.ModelInferRequest:
    given = {"name": "x", "datatype": "UINT8", "shape": [2], **changes}
    message = pb.ModelInferRequest()
    message.inputs.add(**given)
    message.raw_input_contents.append(b"\1\2")
    return message


def many(message: pb.ModelInferRequest) -> bytes:
    for _ in range(5000):
        message.outputs.add()
    return grpc.serialized(message)


BAD_MESSAGES = [
    (b"\xff", "it is no ModelInferRequest"),
    (message_of(datatype="BF16").SerializeToString(), "inputs.0.datatype"),
    (message_of(shape=[3]).SerializeToString(), "inputs.0.data: has 2 bytes"),
    (message_of(shape=[-2]).SerializeToString(), "inputs.0.shape"),
    (message_of(shape=[1] * 5000).SerializeToString(), "more than 4096"),
    (many(message_of()), "more than 4096"),
]


@pytest.mark.parametrize(("message", "why"), BAD_MESSAGES)
def test_messages_that_are_no_request(message: bytes, why: str) -> None:
    with pytest.raises(ProtocolError) as caught:
        grpc.parse_request(message)
    assert str(caught.value).startswith(why)


def test_parameters_that_grpc_cannot_carry() -> None:
    for own, why in (([1], r"^parameters\.own: gRPC has no such value"), (2**63, "parameters.own")):
        with pytest.raises(ProtocolError, match=why):
            grpc.render_response(InferResponse({}, parameters={"own": own}))
    assert grpc.render_response(InferResponse({}, parameters={"own": None})) == b""


def test_metadata() -> None:
    found = Metadata("m", (TensorSpec("x", "FP32", (3,)),), (TensorSpec("y", "INT64", ()),), "p")
    assert found.as_json()["inputs"] == [{"name": "x", "datatype": "FP32", "shape": [-1, 3]}]
    message = pb.ModelMetadataResponse.FromString(grpc.render_metadata(found))
    assert message.outputs[0].shape == [-1]
