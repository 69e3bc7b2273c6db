"""The gateway over HTTP: bodies go to upstreams as they come, and their answers back."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response

from codedinvnet.serving.answers import QueryFailed
from codedinvnet.serving.bodies import BodyMemory, departure, read_body
from codedinvnet.serving.faces.http import protocol_app
from codedinvnet.serving.faces.v2 import short
from codedinvnet.serving.gateway.calls import NotProtocol, Reply, Unreachable, passed_on
from codedinvnet.serving.gateway.outcome import with_outcome
from codedinvnet.serving.gateway.relay import Relay
from codedinvnet.serving.gateway.versions import check_version


def build_gateway_app(
    relay: Relay,
    memory: BodyMemory,
    most: int,
    *,
    token: str = "",
    hosts: tuple[str, ...] = (),
    guarded: bool = False,
) -> Starlette:
    """Return the application; it stops the relay's front end in the end.

    Args:
        relay: answers calls; the caller starts its front end.
        memory: bounds the bytes of all bodies that are here.
        most: bytes of one.
        token: see `AppOptions`.
        hosts: likewise.
        guarded: see `policy_routes`.
    """
    front, pool = relay.front, relay.pool

    def check_model(request: Request) -> str:
        """Return the version that is asked for."""
        name = request.path_params["name"]
        if name != pool.model:
            raise HTTPException(404, f"no model {short(name)}; there is {pool.model!r}")
        found: str = request.path_params.get("model_version", "")
        check_version(found)
        return found

    async def found(model_version: str) -> Mapping[str, Any]:
        try:
            return await pool.model_metadata(model_version)
        except NotProtocol as error:
            raise HTTPException(404, str(error)) from error
        except Unreachable as error:
            raise HTTPException(503, str(error)) from error

    async def check_ready(request: Request) -> None:
        if model_version := check_model(request):
            await found(model_version)

    async def metadata(request: Request) -> Response:
        return JSONResponse(await found(check_model(request)))

    async def infer(request: Request) -> Response:
        model_version, began = check_model(request), time.monotonic()
        front.check_room(1)  # before its body takes any
        with memory.holding() as hold:
            body = await read_body(request, most, front.deadline, hold)
            headers = passed_on(tuple(request.headers.items()))
            if token:  # it is the gateway's own
                headers = tuple(h for h in headers if h[0] != "authorization")
            gone = asyncio.create_task(departure(request.receive))
            try:
                answer = await relay.answer(
                    model_version,
                    "http",
                    body,
                    headers,
                    began=began,
                    gone=gone,
                    hold=hold,
                    url_query=request.scope["query_string"].decode("latin-1"),
                )
            except QueryFailed:
                if gone.done():
                    raise ClientDisconnect from None
                raise
            finally:
                gone.cancel()
            if gone.done():
                raise ClientDisconnect
        return response(with_outcome(*answer))

    return protocol_app(
        front,
        pool.model,
        check_ready,
        infer,
        metadata,
        (),
        token=token,
        hosts=hosts,
        guarded=guarded,
    )


def response(reply: Reply) -> Response:
    """Return an upstream's answer as a response, its headers as they are."""
    found = Response(reply.body, status_code=reply.status)
    length = (b"content-length", str(len(reply.body)).encode())
    own = [(name.encode("latin-1"), value.encode("latin-1")) for name, value in reply.headers]
    found.raw_headers = [*own, length]
    return found
