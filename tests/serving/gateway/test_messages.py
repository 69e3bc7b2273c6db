"""Messages and bodies: what is read of them, what is written into them, one as the other."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from typing import Any

import grpc
import numpy as np
import pytest
from tritonclient.grpc import service_pb2 as pb

from codedinvnet.models.base import HEADER_LENGTH
from codedinvnet.serving.answers import BadRequest
from codedinvnet.serving.faces import v2_grpc
from codedinvnet.serving.faces.http import LARGE_BODY
from codedinvnet.serving.faces.statuses import grpc_status, http_status
from codedinvnet.serving.faces.v2 import TooLarge
from codedinvnet.serving.faces.v2_grpc import (
    Wanted,
    request_from_http,
    request_to_http,
    response_from_http,
    response_to_http,
)
from codedinvnet.serving.gateway.calls import LARGEST, Reply, model_of, passed_on
from codedinvnet.serving.gateway.outcome import outcome_field, with_outcome
from codedinvnet.serving.gateway.translation import beside
from tests.serving.faces.requests import at_most
from tests.serving.gateway.asking import BODY, ask, ask_grpc, request
from tests.serving.gateway.fakes import Fake, GrpcFake, gateway


def message(**raw: bytes) -> pb.ModelInferRequest:
    found = pb.ModelInferRequest(model_name="m" * 200, model_version="3")
    for name, blob in raw.items():
        found.inputs.add(name=name, datatype="UINT8", shape=[len(blob)])
        found.raw_input_contents.append(blob)
    return found


def test_the_model_is_read_without_the_tensors() -> None:
    whole = message(x=bytes(100)).SerializeToString()
    assert model_of(whole) == ("m" * 200, "3")
    assert model_of(whole[:-50]) == ("m" * 200, "3")  # the tensors are not looked at
    assert model_of(b"\x12\x013" + b"\x0a\x01m") == ("m", "3")  # in another order
    assert model_of(b"") == ("", "")
    assert model_of(100_000 * b"\x2a\x00" + b"\x0a\x01m") == ("", "")  # it is not looked for far


@pytest.mark.parametrize("broken", [b"\x0a", b"\x0a\x05m", b"\x0d\0\0\0\0", b"\xff" * 11])
def test_what_is_no_message(broken: bytes) -> None:
    with pytest.raises(ValueError, match=r"it is|64 bits"):
        model_of(broken)


def test_headers_of_one_connection_stay_behind() -> None:
    headers = (("connection", "keep-alive, X-Hop"), ("x-hop", "1"), ("host", "a"), ("x", "2"))
    assert passed_on(headers) == (("x", "2"),)
    again = (("connection", "close"), ("x-too", "3"), ("connection", "x-too"))
    assert passed_on((*headers, *again)) == (("x", "2"),)


@pytest.mark.parametrize(
    ("status", "fails"), [(200, 0), (400, 0), (404, 0), (429, 1), (501, 0), (503, 1)]
)
def test_who_is_to_blame(status: int, fails: int) -> None:
    assert Reply("http", status).fails == bool(fails)
    assert Reply("grpc", grpc_status(status)).fails == bool(fails)
    assert http_status(grpc_status(status)) == status


@pytest.mark.parametrize(
    "details",
    [
        "SERVER: Received message larger than max (200 vs. 100)",
        "grpc: received message larger than max (200 vs. 100)",
        "gRPC message exceeds maximum size 100: 200",
    ],
)
async def test_what_is_too_large_for_an_upstream_is_its_clients_fault(details: str) -> None:
    """It is no overload: nobody else is asked, and trying again later does not help."""
    fakes = GrpcFake(), GrpcFake()

    async with gateway(*fakes, grpc_port=0) as (address, _, port):
        for fake in fakes:
            fake.code, fake.details = grpc.StatusCode.RESOURCE_EXHAUSTED, details
        reply = await ask(address)
        assert (reply.status, json.loads(reply.body)) == (413, {"error": details})
        with pytest.raises(grpc.aio.AioRpcError, match="100") as caught:
            await ask_grpc(port, request(bytes(12)))
        assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert sum(len(fake.seen) for fake in fakes) == 2


@pytest.mark.parametrize(
    "details",
    [
        "",
        "CLIENT: Received message larger than max (2 vs. 1)",
        f"Received message larger than max (2000000000 vs. {LARGEST})",
    ],
)
def test_other_wants_of_an_upstream_are_its_own(details: str) -> None:
    assert Reply("grpc", 8, message=details).fails


@pytest.mark.parametrize("status", [301, 304, 307])
def test_a_redirect_is_no_answer(status: int) -> None:
    assert Reply("http", status).fails


def without_twins(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    assert len(found) == len(pairs)
    return found


@pytest.mark.parametrize(
    ("body", "parameters"),
    [
        (b'{"model_name":"m","outputs":[]}', {"outcome": "direct"}),
        (b'{"parameters":{"a":1},"outputs":[]}', {"outcome": "direct", "a": 1}),
        (b'{"parameters" : { },"outputs":[]}', {"outcome": "direct"}),
        (
            b'{"outputs":[{"parameters":{"b":1}}],"parameters":{"a":1}}',
            {"outcome": "direct", "a": 1},
        ),
        (
            b'{"outputs":[{"data":["]}\\"parameters\\":{"]}],"parameters" :{}}',
            {"outcome": "direct"},
        ),
        (b'{"outputs":[{"parameters":{"b":1}}],"id":"parameters"}', {"outcome": "direct"}),
        (b'{"id":"parameters","outputs":[]}', {"outcome": "direct"}),
        (b'{"id":"\\"outputs\\":","outputs":[{"parameters":{"b":1}}]}', {"outcome": "direct"}),
        (b'{"parameters" : null,"outputs":[{"parameters":null}]}', {"outcome": "direct"}),
        (b'{"outputs":[{"parameters":null}],"parameters":null}', {"outcome": "direct"}),
        (b'{"outputs":[{"parameters":null,"data":["null"]}]}', {"outcome": "direct"}),
    ],
)
def test_the_outcome_is_a_parameter(body: bytes, parameters: dict[str, Any]) -> None:
    binary = b'\xff"outputs":'
    length = (HEADER_LENGTH.lower(), str(len(body)))
    reply = with_outcome(Reply("http", 200, body + binary, (length,)), "direct")
    size = int(dict(reply.headers)[length[0]])
    assert reply.body[size:] == binary
    found = json.loads(reply.body[:size], object_pairs_hook=without_twins)
    assert found.pop("parameters") == parameters
    expected = json.loads(body)
    expected.pop("parameters", None)
    assert found == expected


@pytest.mark.parametrize(
    "body",
    [
        b'{"id":"%b","outputs":[]}' % (b"a" * (1 << 24)),
        b'{"outputs":[{"data":["%b"],"parameters":{}}],"parameters":{"a":1}}' % (b"a" * (1 << 22)),
        b'{"outputs":[%b"parameters"]}' % (b"[" * (1 << 22)),
    ],
)
def test_long_answers_have_the_header_alone_and_take_no_time(body: bytes) -> None:
    """Clients choose the id, and the event loop reads each answer."""
    began = time.process_time()
    reply = with_outcome(Reply("http", 200, body), "direct")
    assert time.process_time() - began < 0.5
    assert (reply.body, reply.headers) == (body, (("codedinvnet-outcome", "direct"),))


def test_parameters_are_found_behind_texts_of_any_kind() -> None:
    text = rb"a\n\"}]\\" * 1000
    outputs = b'[{"data":["%b"],"parameters":{}}]' % text
    body = b'{"outputs":%b,"parameters":{"a":1}}' % outputs
    reply = with_outcome(Reply("http", 200, body), "direct")
    assert json.loads(reply.body)["parameters"] == {"outcome": "direct", "a": 1}


@pytest.mark.parametrize("size", ["\u00b2", "9" * 5000, "-1", ""])
def test_a_size_that_is_none_is_passed_on(size: str) -> None:
    """It is for the client to refuse."""
    length = HEADER_LENGTH.lower()
    reply = with_outcome(Reply("http", 200, b'{"outputs":[]}', ((length, size),)), "direct")
    assert dict(reply.headers)[length] == size
    assert json.loads(reply.body)["parameters"] == {"outcome": "direct"}


def test_null_says_nothing() -> None:
    """KServe's server writes the version of its models so."""
    head = {"model_name": "m", "model_version": None, "id": None, "parameters": {"a": None}}
    output = {"name": "y", "shape": [1], "datatype": "FP32", "parameters": None, "data": [1.0]}
    body = json.dumps({**head, "outputs": [output]}).encode()
    found = pb.ModelInferResponse.FromString(response_from_http(body, None))
    assert (found.model_name, found.model_version, found.id) == ("m", "", "")
    assert not found.parameters


def test_an_upstream_that_was_too_slow_is_a_gateway_timeout() -> None:
    assert http_status(grpc.StatusCode.DEADLINE_EXCEEDED.value[0]) == 504


@pytest.mark.parametrize("body", [b"", b"[]", b"no JSON", b'{"outputs"'])
def test_what_is_no_answer_is_left_alone(body: bytes) -> None:
    assert with_outcome(Reply("http", 200, body), "direct").body == body
    assert with_outcome(Reply("http", 400, b'{"outputs":1}'), "direct").body == b'{"outputs":1}'


def test_the_outcome_is_appended_to_a_message() -> None:
    response = pb.ModelInferResponse(model_name="m", raw_output_contents=[b"12"])
    response.parameters["a"].bool_param = True
    found = pb.ModelInferResponse.FromString(response.SerializeToString() + outcome_field("direct"))
    assert found.parameters.pop("outcome").string_param == "direct"
    assert found == response


@pytest.mark.parametrize("kind", [Fake, GrpcFake])
async def test_an_outcome_that_an_upstream_tells_is_the_one(kind: type[Fake | GrpcFake]) -> None:
    """What another gateway has made up must not be called direct."""

    class Told(GrpcFake):
        async def _infer(self, message: bytes, context: Any) -> bytes:
            context.set_trailing_metadata((("codedinvnet-outcome", "decoded"),))
            return await super()._infer(message, context)

    over_http, over_grpc = Fake(), Told()
    over_http.headers["codedinvnet-outcome"] = "decoded"
    over_http.body = b'{"parameters":{"outcome":"decoded"},' + over_http.body[1:]
    over_grpc.answer.parameters["outcome"].string_param = "decoded"
    fake = over_http if kind is Fake else over_grpc

    async with gateway(fake, grpc_port=0) as (address, _, port):
        reply = await ask(address)
        assert reply.headers.getall("codedinvnet-outcome") == ["decoded"]
        told = json.loads(reply.body, object_pairs_hook=without_twins)
        assert told["parameters"] == {"outcome": "decoded"}
        found, trailers = await ask_grpc(port, request(bytes(12)))
        assert trailers["codedinvnet-outcome"] == "decoded"
        parameters = pb.ModelInferResponse.FromString(found).parameters
        assert {name: value.string_param for name, value in parameters.items()} == {
            "outcome": "decoded"
        }


def tensor_of(datatype: str, values: np.ndarray, contents: str) -> bytes:
    request = pb.ModelInferRequest(model_name="m")
    tensor = request.inputs.add(name="x", datatype=datatype, shape=values.shape)
    getattr(tensor.contents, contents).extend(values.ravel().tolist())
    body, *_ = request_to_http(request.SerializeToString())
    return body.data[body.header_length :]


@pytest.mark.parametrize(
    ("datatype", "contents"),
    [
        ("BOOL", "bool_contents"), ("UINT8", "uint_contents"), ("UINT16", "uint_contents"),
        ("UINT32", "uint_contents"), ("UINT64", "uint64_contents"), ("INT8", "int_contents"),
        ("INT16", "int_contents"), ("INT32", "int_contents"), ("INT64", "int64_contents"),
        ("FP32", "fp32_contents"), ("FP64", "fp64_contents"),
    ],
)  # fmt: skip
def test_typed_contents_become_the_same_bytes(datatype: str, contents: str) -> None:
    kind = {"BOOL": "?", "FP32": "<f4", "FP64": "<f8"}.get(datatype)
    values = np.array(
        [[0, 1, 1]], kind or f"<{datatype[0].lower()}{int(datatype.lstrip('UINT')) // 8}"
    )
    assert tensor_of(datatype, values, contents) == values.tobytes()


def test_bytes_and_what_does_not_fit() -> None:
    request = pb.ModelInferRequest(model_name="m")
    tensor = request.inputs.add(name="x", datatype="BYTES", shape=[2])
    tensor.contents.bytes_contents.extend([b"\xff", b"four"])
    body, *_ = request_to_http(request.SerializeToString())
    assert body.data[body.header_length :] == b"\x01\0\0\0\xff\x04\0\0\0four"
    with pytest.raises(BadRequest, match="x"):
        tensor_of("UINT8", np.array([300]), "uint_contents")
    with pytest.raises(BadRequest, match="FP16"):
        tensor_of("FP16", np.array([1.0]), "fp32_contents")
    lacking = message(x=b"1", y=b"2")
    lacking.raw_input_contents.pop()
    with pytest.raises(BadRequest, match="2 tensors, got 1"):
        request_to_http(lacking.SerializeToString())
    with pytest.raises(BadRequest, match="no ModelInferRequest"):
        request_to_http(b"\xff")


def test_a_request_survives_both_ways() -> None:
    request = message(x=b"12", y=b"")
    request.id = "7"
    for name, kind, value in (
        ("a", "bool_param", True), ("b", "int64_param", -5), ("c", "string_param", "ä"),
        ("d", "double_param", 0.5),
    ):  # fmt: skip
        setattr(request.parameters[name], kind, value)
        setattr(request.inputs[0].parameters[name], kind, value)
    request.outputs.add(name="y").parameters["classification"].int64_param = 2
    body, model, version = request_to_http(request.SerializeToString())
    found, wanted = request_from_http(body.data, str(body.header_length), model, version)
    assert pb.ModelInferRequest.FromString(found) == request
    assert wanted == Wanted({"y": True}, True)


def test_an_answer_survives_both_ways() -> None:
    response = pb.ModelInferResponse(model_name="m", model_version="1", id="7")
    response.parameters["a"].int64_param = 1
    for name, datatype, blob in (("x", "FP32", b"\0\0\x80\x3f"), ("y", "UINT8", b"\x05")):
        response.outputs.add(name=name, datatype=datatype, shape=[1])
        response.raw_output_contents.append(blob)
    body = response_to_http(response.SerializeToString(), Wanted({"y": False}, True))
    head = json.loads(body.data[: body.header_length])
    assert head["outputs"][1]["data"] == [5]
    assert body.data[body.header_length :] == b"\0\0\x80\x3f"
    again = response_from_http(body.data, str(body.header_length))
    assert pb.ModelInferResponse.FromString(again) == response


OTHER_KIND = "a list, object, text or number stands where it has another kind"


@pytest.mark.parametrize(
    ("body", "told"),
    [
        (b"{", "EOF while parsing"),
        (b"[]", OTHER_KIND),
        (b"{}", "'inputs' is missing"),
        (b'{"inputs":1}', OTHER_KIND),
        (b'{"inputs":[{}]}', "'datatype' is missing"),
        (b'{"inputs":[1]}', OTHER_KIND),
        (b'{"inputs":[{"name":"x","datatype":"FP32","shape":[2]}]}', "'data' is missing"),
        (
            b'{"inputs":[{"name":"x","datatype":"FP32","shape":[2],"data":[1]}]}',
            r"has shape \[1\], not \[2\]",
        ),
        (
            b'{"inputs":[{"name":"x","datatype":"FP99","shape":[1],"data":[1]}]}',
            "'x': datatype 'FP99' is none that JSON can carry",
        ),
        (
            b'{"inputs":[{"name":"x","shape":[1],"parameters":{"binary_data_size":9}}]}',
            "x: 0 bytes are left, not 9",
        ),
        (
            b'{"inputs":[{"name":"x","shape":[1],"parameters":{"binary_data_size":"1"}}]}',
            OTHER_KIND,
        ),
        (b'{"inputs":[{"name":"x","datatype":"INT8","shape":["a"],"data":[1]}]}', OTHER_KIND),
        (b'{"inputs":[],"parameters":{"a":[1]}}', "parameters.a: gRPC has no such value"),
        (b'{"inputs":[],"parameters":[1]}', OTHER_KIND),
        (b'{"inputs":[],"outputs":[1]}', OTHER_KIND),
        (b'{"inputs":[]}more', "4 bytes follow the last tensor"),
        (
            b'{"inputs":[{"name":1,"datatype":"INT8","shape":[1],"data":[1]}]}',
            OTHER_KIND,
        ),
    ],
)
def test_bad_bodies(body: bytes, told: str) -> None:
    length = str(body.rindex(b"}") + 1) if b"}" in body else None
    with pytest.raises(BadRequest, match=told):
        request_from_http(body, length, "m", "")


MANY = 5000


def of_many(what: str) -> bytes:
    """Return a small message that has very many of something."""
    request = pb.ModelInferRequest(model_name="m")
    tensor, output = request.inputs.add(), request.outputs.add()
    if what == "shape":
        tensor.shape.extend([1] * MANY)
    elif what == "raw_input_contents":
        request.raw_input_contents.extend([b""] * MANY)
    elif what in ("inputs", "outputs"):
        for _ in range(MANY):
            getattr(request, what).add()
    else:
        owner = {"its": request, "a tensor's": tensor, "an output's": output}[what]
        for number in range(MANY):
            owner.parameters[str(number)].bool_param = True
    found: bytes = request.SerializeToString()
    return found


@pytest.mark.parametrize(
    "what",
    ["inputs", "outputs", "raw_input_contents", "shape", "its", "a tensor's", "an output's"],
)
def test_a_request_of_very_many_parts_is_refused_before_they_are_built(what: str) -> None:
    found = of_many(what)
    with at_most(200_000), pytest.raises(TooLarge, match="4096"):
        request_to_http(found)


@pytest.mark.parametrize(
    "head",
    [
        {"inputs": [{}] * MANY},
        {"inputs": [], "outputs": [{}] * MANY},
        {"inputs": [{"shape": [1] * MANY}]},
        {"inputs": [], "parameters": {str(number): 1 for number in range(MANY)}},
        {"inputs": [{"parameters": {str(number): 1 for number in range(MANY)}}]},
    ],
)
def test_so_is_a_body(head: dict[str, Any]) -> None:
    with pytest.raises(TooLarge, match="4096"):
        request_from_http(json.dumps(head).encode(), None, "m", "")


@pytest.mark.parametrize("part", ["1,", "[],", '{"":1},'])
def test_json_of_very_many_values_is_not_read(part: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(v2_grpc, "MOST_JSON", 10_000)
    body = f'{{"inputs":[],"more":[{10_000 * part}1]}}'.encode()
    with at_most(200_000), pytest.raises(TooLarge, match="binary tensors"):
        request_from_http(body, None, "m", "")


def test_typed_contents_of_very_many_values_are_not_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """All of a message's tensors count together."""
    monkeypatch.setattr(v2_grpc, "MOST_JSON", 10_000)

    def typed(*counts: int) -> bytes:
        request = pb.ModelInferRequest(model_name="m")
        for i, count in enumerate(counts):
            entry = request.inputs.add(name=f"x{i}", datatype="INT64", shape=[count])
            entry.contents.int64_contents.extend([1] * count)
        found: bytes = request.SerializeToString()
        return found

    body, *_ = request_to_http(typed(5000, 5000))
    assert len(body.data) > 10_000 * 8
    for counts, last in (((10_001,), "x0"), ((5000, 5001), "x1")):
        found = typed(*counts)
        with at_most(200_000), pytest.raises(TooLarge, match=f"'{last}'.*send raw contents"):
            request_to_http(found)


async def test_one_large_body_is_translated_at_a_time() -> None:
    alone = threading.Lock()

    def translate() -> None:
        assert alone.acquire(blocking=False)
        time.sleep(0.05)
        alone.release()

    await asyncio.gather(*(beside(LARGE_BODY, translate) for _ in range(4)))


async def test_one_request_may_be_so_large_and_no_larger() -> None:
    fake = Fake()

    async with gateway(fake, max_body=0.01, grpc_port=0) as (address, _, port):
        assert (await ask(address, BODY + bytes(9_000))).status == 200
        assert (await ask(address, BODY + bytes(12_000))).status == 413
        await ask_grpc(port, request(bytes(9_000)))
        with pytest.raises(grpc.aio.AioRpcError):
            await ask_grpc(port, request(bytes(12_000)))
    assert len(fake.seen) == 2
