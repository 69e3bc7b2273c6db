"""Asks a gateway before fakes, over HTTP and gRPC."""

from __future__ import annotations

import asyncio
import io
import time
from collections.abc import Callable
from typing import Any

import aiohttp
import grpc
from tritonclient.grpc import service_pb2 as pb

from codedinvnet.serving.faces.grpc_stubs import SERVICE, UNLIMITED
from codedinvnet.serving.gateway.relay import Relay
from tests.serving.gateway.fakes import ANSWER

BODY = b'{ "inputs": [{"name":"x", "datatype":"FP32","shape":[1,3],"data":[0.10,1e-3,5]}]}'
OUTCOME = b'"parameters":{"outcome":"direct"},'


class Got:
    def __init__(self, status: int, headers: Any, body: bytes) -> None:
        self.status, self.headers, self.body = status, headers, body


async def ask(
    address: str,
    body: bytes = BODY,
    path: str = "/v2/models/m/infer",
    **headers: str,
) -> Got:
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    async with (
        aiohttp.ClientSession(auto_decompress=False) as session,
        session.post(address + path, data=io.BytesIO(body), headers=named) as reply,
    ):
        return Got(reply.status, reply.headers, await reply.read())


async def ask_grpc(port: int | None, message: bytes, timeout: float = 10, **metadata: str) -> Any:
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}", UNLIMITED) as channel:
        call = channel.unary_unary(f"/{SERVICE}/ModelInfer")(
            message, timeout=timeout, metadata=tuple(metadata.items())
        )
        return await call, dict(await call.trailing_metadata())


def request(*raw: bytes) -> bytes:
    message = pb.ModelInferRequest(model_name="m", id="7", raw_input_contents=raw)
    message.parameters["a"].int64_param = 1
    message.inputs.add(name="x", datatype="FP32", shape=[1, 3])
    found: bytes = message.SerializeToString()
    return found


def is_up(relay: Relay) -> list[bool]:
    return [place.up for place in relay.pool.places]


async def ask_until(condition: Callable[[], bool], address: str) -> None:
    """Go on asking, though another upstream answers: one that is tried again is found out so."""
    end = time.monotonic() + 20.0
    while not condition():
        assert time.monotonic() < end
        reply = await ask(address)
        assert (reply.status, reply.body) == (200, ANSWER[:1] + OUTCOME + ANSWER[1:])
        await asyncio.sleep(0.01)
