"""The HTTP face: it reads requests, has the service answer them, and writes the answers."""

from __future__ import annotations

import asyncio
import gzip
import json
import logging
import re
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from importlib import resources
from importlib.metadata import version
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import HTMLResponse, JSONResponse, Response
from starlette.routing import Route

from codedinvnet.models.base import HEADER_LENGTH
from codedinvnet.serving.answers import (
    BadRequest,
    DeadlinePassed,
    NotNow,
    Overloaded,
    QueryFailed,
)
from codedinvnet.serving.background import in_thread
from codedinvnet.serving.bodies import BodyMemory, TooSlow, departure, read_body, read_in_turn
from codedinvnet.serving.faces.middleware import HostCheck, RequestCount, TokenCheck, problem
from codedinvnet.serving.faces.page import demo_routes, page_state
from codedinvnet.serving.faces.policy import policy_routes
from codedinvnet.serving.faces.v2 import (
    OUTCOME_HEADER,
    VERSION,
    TooLarge,
    decompress,
    json_bytes,
    model_metadata,
    parse_request,
    render_response,
    server_metadata,
    short,
)
from codedinvnet.serving.frontend import FrontEnd
from codedinvnet.serving.logs import log_event
from codedinvnet.serving.served import OUTCOME, Served
from codedinvnet.serving.service import Request as Asked
from codedinvnet.serving.service import Response as Answer
from codedinvnet.serving.service import Service

RETRY_AFTER = 1
"""Seconds that clients are asked to wait while the service starts or stops."""
COMPRESSED_FROM = 4096
"""Bytes of a response from which compressing it pays, for clients that ask."""
LARGE_BODY = 64 * 1024
"""Bytes from which a request is parsed in a thread, so that others are served meanwhile."""
LARGE_ANSWER = 4096
"""Values of an answer from which it is written in a thread."""
NO_FRAMES = {"X-Frame-Options": "DENY", "Content-Security-Policy": "frame-ancestors 'none'"}
"""Of the page: another site's page shows it in no frame, where clicks could be led to it."""


@dataclass(frozen=True)
class AppOptions:
    """What the HTTP face goes by.

    Attributes:
        max_batch: queries of a request.
        max_body: bytes of a request, before and after decompression.
        body_memory: bytes of all requests that are here, as bodies or as tensors.
        token: clients must send it as a bearer token ("": none).
        demo: requests that the page may send (see `demo_requests`); None: no buttons.
        hosts: names and addresses that clients may call the service, beside this machine's own for
            itself; "*": any.
        guarded: see `policy_routes`.
    """

    max_batch: int
    max_body: int = 64 * 1024 * 1024
    body_memory: int = 512 * 1024 * 1024
    token: str = ""
    demo: Sequence[Mapping[str, Any]] | None = None
    hosts: tuple[str, ...] = ()
    guarded: bool = False


Handler = Callable[[Request, Any], Awaitable[Response]]


def problems() -> dict[Any, Handler]:
    """Return how every kind of error is answered."""

    async def http_problem(_: Request, error: HTTPException) -> Response:
        return problem(error.status_code, str(error.detail), dict(error.headers or {}))

    async def internal(request: Request, error: Exception) -> Response:
        reason = f"{type(error).__name__}: {error}"
        log_event("internal error", logging.ERROR, path=request.url.path, reason=reason)
        return problem(500, f"internal error: {type(error).__name__}")

    async def no_room(_: Request, error: Exception) -> Response:
        seconds = error.seconds if isinstance(error, Overloaded) else RETRY_AFTER
        return problem(503, f"{error}: try again later", {"Retry-After": str(seconds)})

    async def too_late(_: Request, error: DeadlinePassed) -> Response:
        return problem(504, str(error))

    async def failed(_: Request, error: QueryFailed) -> Response:
        return problem(500, str(error))

    async def client_left(_: Request, __: ClientDisconnect) -> Response:
        return Response(status_code=499)  # nobody reads it

    async def too_slow(_: Request, error: TooSlow) -> Response:
        return problem(408, str(error), {"Connection": "close"})  # the rest may still come

    async def bad_request(_: Request, error: BadRequest) -> Response:
        return problem(413 if isinstance(error, TooLarge) else 400, str(error))

    return {
        HTTPException: http_problem,
        Exception: internal,
        NotNow: no_room,
        DeadlinePassed: too_late,
        QueryFailed: failed,
        ClientDisconnect: client_left,
        TooSlow: too_slow,
        BadRequest: bad_request,
    }


def protocol_app(
    front: FrontEnd,
    model: str,
    check_model: Callable[[Request], Awaitable[None]],
    infer: Callable[[Request], Awaitable[Response]],
    metadata: Callable[[Request], Awaitable[Response]],
    routes: Sequence[Route],
    *,
    token: str = "",
    hosts: tuple[str, ...] = (),
    guarded: bool = False,
    starts: bool = False,
) -> Starlette:
    """Return an application that speaks the protocol; it stops the front end in the end.

    Args:
        front: answers queries.
        model: its name.
        check_model: refuses the question whether another model or version is ready.
        infer: answers an inference request.
        metadata: answers the question for the model's.
        routes: others.
        token: see `AppOptions`.
        hosts: likewise.
        guarded: likewise.
        starts: see `build_app`.
    """

    @asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncIterator[None]:
        try:
            if starts:
                await front.start()
            yield
        finally:
            await front.stop()

    async def live(_: Request) -> Response:
        alive = front.supervisor.is_live
        return JSONResponse({"live": alive}, status_code=200 if alive else 503)

    def whether_ready(**more: str) -> Response:
        up = front.ready and front.scheduler.workers_up > 0
        return JSONResponse({**more, "ready": up}, status_code=200 if up else 503)

    async def ready(_: Request) -> Response:
        return whether_ready()

    async def model_ready(request: Request) -> Response:
        await check_model(request)
        return whether_ready(name=model)

    async def server(_: Request) -> Response:
        return JSONResponse(server_metadata(version("codedinvnet")))

    rendering = asyncio.Lock()

    async def metrics(_: Request) -> Response:
        async with rendering:  # one at a time; those of many upstreams take a while
            front.update_gauges()
            text = await in_thread(front.metrics.render)
        return Response(text, media_type="text/plain; version=0.0.4")

    of_model = [
        Route(f"/v2/models/{{name}}{version_part}{path}", endpoint, methods=[verb])
        for version_part in ("", "/versions/{model_version}")
        for path, endpoint, verb in (
            ("/infer", infer, "POST"),
            ("", metadata, "GET"),
            ("/ready", model_ready, "GET"),
        )
    ]
    of_server = [
        Route("/v2/health/live", live),
        Route("/v2/health/ready", ready),
        Route("/v2", server),
        Route("/metrics", metrics),
        *policy_routes(front, guarded=guarded),
    ]
    middleware = [
        Middleware(RequestCount, counter=front.metrics.requests),
        Middleware(HostCheck, hosts=hosts),
    ]
    if token:
        middleware.append(Middleware(TokenCheck, token=token))
    app = Starlette(
        routes=[*of_model, *of_server, *routes],
        middleware=middleware,
        exception_handlers=problems(),
        lifespan=lifespan,
    )
    app.router.redirect_slashes = False
    return app


def build_app(
    service: Service,
    options: AppOptions,
    *,
    memory: BodyMemory | None = None,
    starts: bool = True,
) -> Starlette:
    """Return the application; it stops the service's front end in the end.

    Args:
        service: answers the requests.
        options: see `AppOptions`.
        memory: bounds the bytes of all requests that are here, over another face as well; None: of
            this one's alone.
        starts: start the front end, too, before anything is answered. Otherwise the caller does,
            and until then queries are refused.
    """
    front, served = service.front, service.served
    memory = memory or BodyMemory(options.body_memory, front.refuse)
    large = memory.large

    def check_model(request: Request) -> None:
        name = request.path_params["name"]
        model_version = request.path_params.get("model_version", VERSION)
        if name != served.name or model_version != VERSION:
            asked = f"{short(name)} version {short(model_version)}"
            raise HTTPException(404, f"no model {asked}; there is {served.name!r} 1")

    async def check_ready(request: Request) -> None:
        check_model(request)

    async def metadata(request: Request) -> Response:
        check_model(request)
        return JSONResponse(model_metadata(served))

    async def take_in(
        request: Request, began: float, hold: Callable[[int], None]
    ) -> tuple[Asked, asyncio.Task[None]]:
        """Read and parse a request; also return a task that ends when its client goes away."""
        headers = request.headers
        packed = "content-encoding" in headers
        most = options.max_body
        if HEADER_LENGTH not in headers:
            most = min(most, json_bytes(served))
        body = await read_body(request, most, front.deadline, hold)

        def parse() -> Asked:
            plain = decompress(body, headers.get("content-encoding"), most)
            length = headers.get(HEADER_LENGTH)
            return parse_request(plain, length, served, options.max_batch)

        gone = asyncio.create_task(departure(request.receive))
        try:
            if len(body) < LARGE_BODY and not packed:
                parsed = parse()
            else:
                parsed = await read_in_turn(large, front, parse, began, gone)
            hold(parsed.size)
        except BaseException:
            gone.cancel()
            raise
        return parsed, gone

    async def infer(request: Request) -> Response:
        check_model(request)
        began = time.monotonic()
        front.check_room(1)  # before its body takes any
        with memory.holding() as hold:
            return await respond(request, began, hold)

    async def respond(request: Request, began: float, hold: Callable[[int], None]) -> Response:
        parsed, gone = await take_in(request, began, hold)
        try:
            if gone.done():
                raise ClientDisconnect
            try:
                answer = await service.answer(parsed, began=began, gone=gone)
            except QueryFailed:
                if gone.done():
                    raise ClientDisconnect from None
                raise
            if gone.done():
                raise ClientDisconnect
        finally:
            gone.cancel()
        packs = wants_gzip(request.headers.get("accept-encoding", ""))

        def write() -> Response:
            return written(parsed, answer, served, packs)

        if answer.values < LARGE_ANSWER:
            return write()
        async with large:
            return await asyncio.to_thread(write)

    async def times(_: Request) -> Response:
        return await written_in_a_thread(front.times.report)

    page = (resources.files("codedinvnet.serving.faces") / "page.html").read_text(encoding="utf-8")

    async def index(_: Request) -> Response:
        return HTMLResponse(page, headers=NO_FRAMES)

    async def state(_: Request) -> Response:
        return JSONResponse(page_state(service, demo=options.demo is not None))

    routes = [
        Route("/times", times),
        Route("/", index),
        Route("/page/state", state),
        *(() if options.demo is None else demo_routes(front, options.demo)),
    ]
    return protocol_app(
        front,
        served.name,
        check_ready,
        infer,
        metadata,
        routes,
        token=options.token,
        hosts=options.hosts,
        guarded=options.guarded,
        starts=starts,
    )


async def written_in_a_thread(report: Callable[[], Mapping[str, Any]]) -> Response:
    """Return a report of ten thousands of numbers as JSON."""

    def data() -> bytes:
        return json.dumps(report()).encode()

    return Response(await asyncio.to_thread(data), media_type="application/json")


def written(parsed: Asked, answer: Answer, served: Served, packs: bool) -> Response:
    """Return the response with a request's answers, compressed if that pays and may be."""
    data, head = render_response(parsed, answer, served)
    kind = "application/json" if head is None else "application/octet-stream"
    extra = {} if head is None else {HEADER_LENGTH: str(head)}
    if len(data) >= COMPRESSED_FROM:
        extra["Vary"] = "Accept-Encoding"
        if packs:
            data = gzip.compress(data, 1)
            extra["Content-Encoding"] = "gzip"
    if OUTCOME in answer.parameters:
        extra[OUTCOME_HEADER] = answer.parameters[OUTCOME]
    work = 1000 * answer.work_seconds
    extra["Server-Timing"] = f"work;dur={work:.3f}"  # as the W3C's header, in ms
    return Response(data, media_type=kind, headers=extra)


def wants_gzip(accepted: str) -> bool:
    """Tell whether an Accept-Encoding header asks for gzip; a weight of 0 forbids it."""
    for part in accepted.lower().split(","):
        coding, _, weight = part.partition(";")
        if coding.strip() == "gzip":
            return not re.fullmatch(r"q=0(\.0*)?", weight.replace(" ", ""))
    return False
