"""Requests that a gateway sends nowhere: a copy, or another server, would spoil something."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import grpc
import pytest
from tritonclient.grpc import service_pb2 as pb

from codedinvnet.serving.gateway.unrepeatable import check_repeatable
from tests.protect.conftest import finished  # noqa: F401
from tests.serving.gateway.asking import BODY, ask, ask_grpc
from tests.serving.gateway.fakes import Fake, GrpcFake, gateway
from tests.serving.gateway.servers import SMALL, Server


@pytest.mark.parametrize(
    ("parameters", "refused"),
    [
        ({"sequence_id": 7, "sequence_start": True}, True),
        ({"sequence_id": "a"}, True),
        ({"sequence_id": 0}, False),
        ({"sequence_id": ""}, False),
        ({"priority": 1}, False),
    ],
)
async def test_requests_of_a_sequence_are_refused(
    parameters: dict[str, Any], refused: bool
) -> None:
    """Its server keeps a state between them: a copy, or another server, would spoil it."""
    fake = Fake()
    text = json.dumps({"parameters": parameters, **json.loads(BODY)}, indent=1).encode()
    message = pb.ModelInferRequest(model_name="m", raw_input_contents=[b"\x12\x02\x10\x00"])
    message.inputs.add(name="x", datatype="UINT8", shape=[4])
    for name, value in parameters.items():
        kinds = {bool: "bool_param", int: "int64_param", str: "string_param"}
        setattr(message.parameters[name], kinds[type(value)], value)

    async with gateway(fake, grpc_port=0) as (address, _, port):
        binary = await ask(address, text + b"raw", inference_header_content_length=str(len(text)))
        for reply in (await ask(address, text), binary):
            assert reply.status == (400 if refused else 200)
            assert (b"sequence_id: all requests" in reply.body) == refused
        asked = ask_grpc(port, message.SerializeToString())
        if refused:
            with pytest.raises(grpc.aio.AioRpcError, match="sequence_id: all requests") as caught:
                await asked
            assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
        else:
            await asked
    assert len(fake.seen) == (0 if refused else 3)


async def test_the_word_alone_makes_no_sequence() -> None:
    fake = Fake()
    words = b'{"inputs":[{"name":"x","datatype":"BYTES","shape":[2],"data":["sequence_id",":7"]}]}'

    async with gateway(fake) as (address, _, _):
        assert (await ask(address, words)).status == 200
        tensor = b'"sequence_id": 7'
        reply = await ask(address, BODY + tensor, inference_header_content_length=str(len(BODY)))
        assert reply.status == 200


async def test_a_damaged_request_is_for_its_server_to_refuse() -> None:
    """Looking for a sequence must not end in an error of the gateway's own."""
    fake = Fake()
    cut = pb.ModelInferRequest(model_name="m").SerializeToString() + b"\x22\x40\x0a"
    check_repeatable("grpc", cut, ())

    async with gateway(fake) as (address, _, _):
        reply = await ask(address, BODY, inference_header_content_length="9" * 5000)
        assert reply.status == 200
    assert len(fake.seen) == 1


REGION = {"shared_memory_region": "mine", "shared_memory_byte_size": 12}


def with_region(place: str) -> bytes:
    """Return a body with an input or an output in shared memory."""
    told = {**json.loads(BODY), "outputs": [{"name": "y"}]}
    told[place][0]["parameters"] = REGION
    return json.dumps(told).encode()


@pytest.mark.parametrize("place", ["inputs", "outputs"])
async def test_requests_with_shared_memory_are_refused(place: str) -> None:
    """A late copy of one would write into what its client has in use for another by then."""
    fake, text = Fake(), with_region(place)
    message = pb.ModelInferRequest(model_name="m")
    message.inputs.add(name="x", datatype="FP32", shape=[1, 3])
    message.outputs.add(name="y")
    plain = message.SerializeToString()
    owner = getattr(message, place)[0]
    owner.parameters["shared_memory_byte_size"].int64_param = 12
    owner.parameters["shared_memory_region"].string_param = "mine"

    async with gateway(fake, grpc_port=0) as (address, _, port):
        binary = await ask(address, text + b"raw", inference_header_content_length=str(len(text)))
        for reply in (await ask(address, text), binary):
            assert (reply.status, b"shared_memory_region: a second" in reply.body) == (400, True)
        with pytest.raises(grpc.aio.AioRpcError, match="shared_memory_region: a sec") as caught:
            await ask_grpc(port, message.SerializeToString())
        assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
        assert not fake.seen
        await ask_grpc(port, plain)
        words = b'{"inputs":[{"name":"x","data":["shared_memory_region",":"]}]}'
        assert (await ask(address, words)).status == 200


async def test_what_is_unpacked_is_looked_into() -> None:
    """For an upstream over gRPC it is; the client's own fault reaches no upstream."""
    fake = GrpcFake()
    sequence = json.dumps({"parameters": {"sequence_id": 7}, **json.loads(BODY)}).encode()

    async with gateway(fake) as (address, _, _):
        for text in (sequence, with_region("outputs")):
            reply = await ask(address, gzip.compress(text), content_encoding="gzip")
            assert reply.status == 400
            assert b"sequence_id: all" in reply.body or b"region: a second" in reply.body
        assert not fake.seen
        assert (await ask(address, gzip.compress(BODY), content_encoding="gzip")).status == 200


async def test_so_is_what_a_small_backup_reads(finished: Path) -> None:  # noqa: F811
    server = Server()
    async with gateway(server, protection=finished, **SMALL) as (address, _, _):
        server.seen.clear()
        packed = gzip.compress(with_region("inputs"))
        assert (await ask(address, packed, content_encoding="gzip")).status == 400
        assert not server.seen
