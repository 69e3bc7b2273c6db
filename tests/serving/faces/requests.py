"""Requests of the protocol V2, right and wrong, for the tests."""

from __future__ import annotations

import asyncio
import json
import time
import tracemalloc
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from typing import Any

import grpc
import numpy as np
from tritonclient.grpc import service_pb2 as pb

from codedinvnet.models.base import HEADER_LENGTH
from codedinvnet.serving.faces.grpc_stubs import SERVICE
from codedinvnet.serving.faces.v2 import parse_request
from codedinvnet.serving.served import Classifier, Served
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


@asynccontextmanager
async def half_sent(address: str, model: str, size: int) -> AsyncIterator[None]:
    """Send so many bytes of a body over HTTP, of which the last never comes."""
    host, port = address.removeprefix("http://").split(":")
    _, writer = await asyncio.open_connection(host, int(port))
    head = (
        f"POST /v2/models/{model}/infer HTTP/1.1\r\nHost: {host}\r\n"
        f"Content-Length: {size + 1}\r\n{HEADER_LENGTH}: 10\r\n\r\n"
    )
    writer.write(head.encode() + bytes(size))
    try:
        await writer.drain()
        yield
    finally:
        writer.close()
        await writer.wait_closed()


async def ask_until(
    code: grpc.StatusCode, target: str, message: pb.ModelInferRequest, seconds: float = 30.0
) -> None:
    """Ask over gRPC until the answer has a status."""
    end = time.monotonic() + seconds
    async with grpc.aio.insecure_channel(target) as channel:
        ask = channel.unary_unary(f"/{SERVICE}/ModelInfer")
        while True:
            call = ask(message.SerializeToString())
            if await call.code() is code:
                return
            assert time.monotonic() < end, await call.details()
            await asyncio.sleep(0.02)


async def share_memory(address: str, port: int | None, message: pb.ModelInferRequest) -> None:
    """Check that HTTP and gRPC share 64 KiB for requests, with a message that is made longer."""
    message.id = "7" * 40_000
    target = f"127.0.0.1:{port}"
    await ask_until(grpc.StatusCode.OK, target, message)
    async with half_sent(address, message.model_name, len(message.id)):
        await ask_until(grpc.StatusCode.UNAVAILABLE, target, message)
    await ask_until(grpc.StatusCode.OK, target, message)


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


def answered(rows: int) -> Response:
    """Return a response with the first so many rows of these."""
    outputs: dict[str, np.ndarray] = {
        "probabilities": np.array([[0.25, 0.5, 0.25], [0.125, 0.125, 0.75]] * 2, np.float32),
        "label": np.array([1, 2] * 2, np.int64),
        "outcome": np.array([b"direct", b"decoded"] * 2, object),
    }
    return Response({name: values[:rows] for name, values in outputs.items()}, 0.1)
