"""A call that came over one transport, to an upstream that speaks the other."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from codedinvnet.models.base import HEADER_LENGTH
from codedinvnet.serving.answers import BadRequest
from codedinvnet.serving.faces.http import LARGE_BODY
from codedinvnet.serving.faces.statuses import grpc_status, http_status
from codedinvnet.serving.faces.v2 import TooLarge
from codedinvnet.serving.faces.v2_grpc import (
    NotInJson,
    request_from_http,
    request_to_http,
    response_from_http,
    response_to_http,
)
from codedinvnet.serving.gateway.calls import (
    OK,
    Call,
    Headers,
    Reply,
    passed_on,
    problem,
)
from codedinvnet.serving.gateway.outcome import own_outcome

Result = TypeVar("Result")
Post = Callable[[bytes, Headers], Awaitable[Reply]]
BODY_HEADERS = frozenset(
    {
        HEADER_LENGTH.lower(),
        "content-type",
        "content-encoding",
        "accept",
        "accept-encoding",
        "user-agent",
    }
)
"""Headers of HTTP about bodies, which are others over the other transport."""
NAMES = re.compile("[0-9a-z_.-]+")
"""Names that metadata of gRPC may have; `grpc-` is its own, and `-bin` is for bytes."""
INTERNAL = 13
"""The gRPC code of an answer that is none."""
ONE_AT_A_TIME = ThreadPoolExecutor(1, "translation")
"""Reading what is large holds the interpreter for a while, and takes memory."""


async def beside(size: int, function: Callable[..., Result], *arguments: Any) -> Result:
    """Return what a function returns, in a thread if it reads a large body: the loop goes on.

    One large body is read at a time, and none that nobody waits for any more.
    """
    if size < LARGE_BODY:
        return function(*arguments)
    loop = asyncio.get_running_loop()
    return await loop.run_in_executor(ONE_AT_A_TIME, function, *arguments)


async def through_http(call: Call, post: Post) -> Reply:
    """Return the answer to a call over gRPC, of an upstream that is reached over HTTP."""
    length = HEADER_LENGTH.lower()
    try:
        body, _, _ = await beside(len(call.body), request_to_http, call.body)
    except BadRequest as error:
        return Reply("grpc", 3, message=str(error))
    own = tuple(
        (name, value)
        for name, value in passed_on(call.headers)
        if name not in BODY_HEADERS and not name.startswith("grpc-")
    )
    kind = "application/json" if body.header_length is None else "application/octet-stream"
    headers: Headers = (*own, ("content-type", kind))
    if body.header_length is not None:
        headers = (*headers, (length, str(body.header_length)))
    reply = await post(body.data, headers)
    if reply.status != 200:
        code = grpc_status(reply.status) or INTERNAL  # a redirect, or no content, is no answer
        return Reply("grpc", code, message=told(reply.body) or f"HTTP status {reply.status}")
    try:
        own_length = dict(reply.headers).get(length)
        message = await beside(len(reply.body), response_from_http, reply.body, own_length)
    except BadRequest as error:
        return Reply("grpc", INTERNAL, message=f"the upstream's answer: {error}")
    return Reply("grpc", OK["grpc"], message, own_outcome(reply.headers))


async def through_grpc(call: Call, post: Post) -> Reply:
    """Return the answer to a call over HTTP, of an upstream that is reached over gRPC."""
    stated = dict(call.headers).get(HEADER_LENGTH.lower())
    try:
        plain = await call.unpacked()
        message, wanted = await beside(
            len(plain), request_from_http, plain, stated, call.model, call.version
        )
    except BadRequest as error:
        return problem(413 if isinstance(error, TooLarge) else 400, str(error))
    own = tuple(h for h in call.headers if h[0] not in BODY_HEADERS and is_metadata(*h))
    reply = await post(message, own)
    if reply.status != OK["grpc"]:
        status = 413 if reply.asks_too_much else http_status(reply.status)
        return problem(status, reply.message)
    try:
        body = await beside(len(reply.body), response_to_http, reply.body, wanted)
    except NotInJson as error:
        return problem(400, str(error))
    except BadRequest as error:
        return problem(502, f"the upstream's answer: {error}")
    headers: Headers = (("content-type", "application/json"),)
    if body.header_length is not None:
        headers = (
            ("content-type", "application/octet-stream"),
            (HEADER_LENGTH.lower(), str(body.header_length)),
        )
    return Reply("http", 200, body.data, (*headers, *own_outcome(reply.headers)))


def is_metadata(name: str, value: str) -> bool:
    """Return whether gRPC takes a header of HTTP as it is: it refuses the call for any other."""
    taken = NAMES.fullmatch(name) is not None and not name.startswith("grpc-")
    return taken and not name.endswith("-bin") and value.isascii() and value.isprintable()


def told(body: bytes) -> str:
    """Return what an error's body over HTTP says."""
    text = body.decode(errors="replace")
    try:
        found = json.loads(text)
    except ValueError:
        return text.strip()
    return str(found["error"]) if isinstance(found, dict) and "error" in found else text
