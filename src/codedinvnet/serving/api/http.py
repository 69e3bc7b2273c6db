"""The protocol over HTTP, as one ASGI application: inference, health, metadata, metrics, policy."""

from __future__ import annotations

import asyncio
import gzip
import json
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route, Router
from starlette.types import Receive, Scope, Send

from codedinvnet.net.background import in_thread
from codedinvnet.protocol import http
from codedinvnet.protocol.messages import (
    HEADER_LENGTH,
    InferRequest,
    ProtocolError,
    server_metadata,
)
from codedinvnet.serving.answers import QueryFailed
from codedinvnet.serving.api.bodies import GONE, LARGE, BodyMemory, departure, read_body
from codedinvnet.serving.api.errors import problem
from codedinvnet.serving.api.guard import Guard
from codedinvnet.serving.choices import Choices
from codedinvnet.serving.service import InferenceService, ServedResponse
from codedinvnet.serving.tracing import Tracing

MODEL = r"/v2/models/(?P<name>[^/]+)(/versions/(?P<version>[^/]+))?"
INFER = re.compile(MODEL + "/infer")
COMPRESSED_FROM = 4096
"""Bytes of a response from which compressing it pays, for clients that ask."""
LARGE_ANSWER = 4096
"""Values of an answer from which it is written in a thread."""
POLICY_BODY = 4096
"""Bytes of a request for another policy, at most."""


@dataclass(frozen=True)
class ApiOptions:
    """What the HTTP API goes by.

    Attributes:
        token: clients must send it as a bearer token ("": none).
        hosts: see `Guard`.
        guarded: whether a token is needed, or only this machine reaches the port; without either,
            the policy cannot be changed.
        demo: requests that the page may send (see `demo_requests`); None: no buttons.
    """

    token: str = ""
    hosts: tuple[str, ...] = ()
    guarded: bool = False
    demo: Sequence[Mapping[str, Any]] | None = None


class HttpApi:
    """An ASGI application that answers one service's clients.

    Args:
        service: answers their requests.
        memory: bounds what they hold.
        choices: the policies that can be changed to.
        options: see `ApiOptions`.
        routes: others than the protocol's.
        starts: start the dispatcher before anything is answered, and stop it in the end. Otherwise
            the caller does, and until then queries are refused.
    """

    def __init__(
        self,
        service: InferenceService,
        memory: BodyMemory,
        choices: Choices,
        options: ApiOptions,
        routes: Sequence[Route] = (),
        starts: bool = True,
    ) -> None:
        self.service, self.memory, self.choices = service, memory, choices
        self.options, self.starts = options, starts
        self.dispatcher = service.dispatcher
        self.requests = self.dispatcher.metrics.requests
        self.guard = Guard(options.hosts, options.token)
        self.tracing: Tracing | None = None
        self._rendering = asyncio.Lock()
        self.router = Router([*self._routes(), *routes], redirect_slashes=False)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request; errors become answers here."""
        if scope["type"] != "http":
            await self._lifespan(receive, send)
            return
        path = scope["path"]
        if self.tracing is not None and path.endswith("/infer"):
            names = ((k.decode("latin-1"), v.decode("latin-1")) for k, v in scope["headers"])
            about = {"http.request.method": scope["method"], "url.path": path}
            with self.tracing.request(f"{scope['method']} infer", names, about) as span:
                response = await self._respond(scope, receive, send)
                span.ended(500 if response is None else response.status_code)
        else:
            response = await self._respond(scope, receive, send)
        if response is not None:
            await response(scope, receive, send)

    async def _respond(
        self, scope: Scope, receive: Receive, send: Send
    ) -> Response | InferAnswer | None:
        """Return the response to a request; None if the router has sent one."""
        path = scope["path"]
        response: Response | InferAnswer
        try:
            self.guard.check(scope)
            found = INFER.fullmatch(path)
            if found is None:
                scope["app"] = self  # then the router raises its errors
                await self.router(scope, receive, send)
                return None
            if scope["method"] != "POST":
                raise HTTPException(405, "Method Not Allowed", {"Allow": "POST"})
            response = await self.infer(scope, receive, found)
        except Exception as error:
            response = problem(error, path).response()
        if path.endswith("/infer"):
            self.requests.labels(str(response.status_code)).inc()
        return response

    async def _lifespan(self, receive: Receive, send: Send) -> None:
        await receive()
        try:
            if self.starts:
                await self.dispatcher.start()
        except BaseException as error:
            await send({"type": "lifespan.startup.failed", "message": str(error)})
            raise
        await send({"type": "lifespan.startup.complete"})
        await receive()
        if self.starts:
            await self.dispatcher.stop()
        await send({"type": "lifespan.shutdown.complete"})

    # Inference

    async def infer(self, scope: Scope, receive: Receive, path: re.Match[str]) -> InferAnswer:
        """Answer an inference request."""
        began, service = time.monotonic(), self.service
        self.service.check_model(path["name"], path["version"])
        self.dispatcher.check_room(1)  # before its body takes any
        headers = {
            name: value.decode("latin-1")
            for name, value in scope["headers"]
            if name in (BODY_LENGTH, b"content-encoding", b"accept-encoding")
        }
        length, coding = headers.get(BODY_LENGTH), headers.get(b"content-encoding")
        most = service.limits.head if length is None else service.limits.body

        with self.memory.holding() as hold:
            body = await read_body(receive, most, self.dispatcher.timing.deadline, hold)

            def parse() -> InferRequest:
                return http.parse_request(body, length, coding, service.limits, service.check)

            gone, watching = scope.get("extensions", {}).get(GONE), None
            if gone is None:
                gone = watching = asyncio.create_task(departure(receive))
            try:
                if len(body) < LARGE and coding is None:
                    request = parse()
                else:
                    request = await self.memory.parse(parse, began, gone)
                hold(max(len(body), request.size))
                answer = await service.answer(request, began, gone)
                if gone.done():
                    raise ClientDisconnect
            except QueryFailed:
                if gone.done():
                    raise ClientDisconnect from None
                raise
            finally:
                if watching is not None:
                    watching.cancel()
        packs = wants_gzip(headers.get(b"accept-encoding", ""))
        if answer.values < LARGE_ANSWER:
            return written(request, answer, packs)
        return await self.memory.write(lambda: written(request, answer, packs))

    # The rest

    def _routes(self) -> list[Route]:
        of_model = "/v2/models/{name}"
        return [
            Route(f"{of_model}{part}{path}", endpoint)
            for part in ("", "/versions/{version}")
            for path, endpoint in (("", self._metadata), ("/ready", self._model_ready))
        ] + [
            Route("/v2/health/live", self._live),
            Route("/v2/health/ready", self._ready),
            Route("/v2", self._server),
            Route("/metrics", self._metrics),
            Route("/policy", self._policy),
            Route("/policy", self._change_policy, methods=["POST"]),
        ]

    async def _live(self, _: Request) -> Response:
        alive = self.dispatcher.supervisor.is_live
        return JSONResponse({"live": alive}, status_code=200 if alive else 503)

    def _readiness(self, **about: str) -> Response:
        up = self.dispatcher.is_up
        return JSONResponse({**about, "ready": up}, status_code=200 if up else 503)

    async def _ready(self, _: Request) -> Response:
        return self._readiness()

    async def _model_ready(self, request: Request) -> Response:
        name = request.path_params["name"]
        self.service.check_model(name, request.path_params.get("version"))
        return self._readiness(name=name)

    async def _metadata(self, request: Request) -> Response:
        self.service.check_model(request.path_params["name"], request.path_params.get("version"))
        return JSONResponse(self.service.metadata.as_json())

    async def _server(self, _: Request) -> Response:
        return JSONResponse(server_metadata(version("codedinvnet")))

    async def _metrics(self, _: Request) -> Response:
        async with self._rendering:  # one at a time
            self.dispatcher.update_gauges()
            text = await in_thread(self.dispatcher.metrics.render)
        return Response(text, media_type="text/plain; version=0.0.4")

    async def _policy(self, _: Request) -> Response:
        return JSONResponse(self.choices.report(self.dispatcher.scheduler.chosen))

    async def _change_policy(self, request: Request) -> Response:
        if not self.options.guarded:
            why = "any client that reaches the port could do this: it needs --token-file"
            raise HTTPException(403, why)
        # Pages of other sites can send no such content.
        if request.headers.get("content-type", "").partition(";")[0].strip() != "application/json":
            raise HTTPException(415, "the content type must be application/json")
        deadline = self.dispatcher.timing.deadline
        body = await read_body(request.receive, POLICY_BODY, deadline, lambda _: None)
        try:
            wanted = json.loads(body)
        except (ValueError, RecursionError) as error:
            raise ProtocolError(f"the body is not JSON: {error}") from error
        name = wanted.get("policy") if isinstance(wanted, dict) else None
        if not isinstance(name, str):
            raise ProtocolError('the body must be an object, {"policy": NAME}')
        self.dispatcher.change_policy(self.choices.named(name))
        return await self._policy(request)


BODY_LENGTH = HEADER_LENGTH.lower().encode()


class InferAnswer:
    """The answer to an inference request, as an ASGI application; a lean Starlette `Response`."""

    status_code = 200

    def __init__(self, data: bytes, headers: list[tuple[bytes, bytes]]) -> None:
        self.body, self.headers = data, headers

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send it."""
        await send({"type": "http.response.start", "status": 200, "headers": self.headers})
        await send({"type": "http.response.body", "body": self.body})


def written(request: InferRequest, answer: ServedResponse, packs: bool) -> InferAnswer:
    """Return the response with a request's answers, compressed if that pays and may be."""
    data, head = http.render_response(answer.message, request)
    # As the W3C's header, in ms.
    headers = [(b"server-timing", b"work;dur=%.3f" % (1000 * answer.work_seconds))]
    if head is None:
        headers.append((b"content-type", b"application/json"))
    else:
        headers.append((b"content-type", b"application/octet-stream"))
        headers.append((BODY_LENGTH, b"%d" % head))
    if len(data) >= COMPRESSED_FROM:
        headers.append((b"vary", b"Accept-Encoding"))
        if packs:
            data = gzip.compress(data, 1)
            headers.append((b"content-encoding", b"gzip"))
    return InferAnswer(data, [*headers, (b"content-length", b"%d" % len(data))])


def wants_gzip(accepted: str) -> bool:
    """Tell whether an Accept-Encoding header asks for gzip; a weight of 0 forbids it."""
    for part in accepted.lower().split(","):
        coding, _, weight = part.partition(";")
        if coding.strip() == "gzip":
            return not re.fullmatch(r"q=0(\.0*)?", weight.replace(" ", ""))
    return False
