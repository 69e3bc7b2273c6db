"""The HTTP face: Open Inference Protocol, metrics, and the page."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import gzip
import hmac
import ipaddress
import json
import logging
import os
import re
import signal
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from importlib import resources
from importlib.metadata import version
from typing import Any

import numpy as np
from prometheus_client import Counter
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import HTMLResponse, JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from codedinvnet.serving.actions import DEADLINE
from codedinvnet.serving.faults import Delay, Fault, FaultyPool
from codedinvnet.serving.frontend import (
    Answered,
    DeadlinePassed,
    Draining,
    FrontEnd,
    Overloaded,
    Starting,
)
from codedinvnet.serving.metrics import OUTCOMES, log_event
from codedinvnet.serving.protocol import (
    HEADER_LENGTH,
    LONGEST_SHOWN,
    VERSION,
    BadRequest,
    InferRequest,
    ModelDescription,
    TooLarge,
    decompress,
    model_metadata,
    parse_request,
    render_response,
    server_metadata,
    short,
)
from codedinvnet.serving.supervisor import STARTING

RETRY_AFTER = 1
"""Seconds that clients are asked to wait while the service starts or stops."""
COMPRESSED_FROM = 4096
"""Bytes of a response from which compressing it pays, for clients that ask."""
LARGE_BODY = 64 * 1024
"""Bytes from which a request is parsed in a thread, so that others are served meanwhile."""
LARGE_ANSWER = 4096
"""Values of an answer from which it is written in a thread."""
LOOPBACK = ("127.0.0.1", "::1", "localhost")
ANY_ADDRESS = ("0.0.0.0", "::")
"""Hosts to listen on that mean every address of this machine."""
NO_FRAMES = {"X-Frame-Options": "DENY", "Content-Security-Policy": "frame-ancestors 'none'"}
"""Of the page: another site's page shows it in no frame, where clicks could be led to it."""
SLOW_MS = 300.0
"""How much the page's button slows a worker."""
SILENT_AFTER = 0.3
"""Seconds on one task after which the page calls a worker silent."""
DEMO_HEADER = "X-Codedinvnet-Demo"
"""Of requests that hurt workers: pages of other sites cannot send it."""


@dataclass(frozen=True)
class AppOptions:
    """What the HTTP face goes by.

    Attributes:
        model: what is served.
        max_body: bytes of a request, before and after decompression.
        body_memory: bytes of all requests that are here, as bodies or as images.
        token: clients must send it as a bearer token ("": none).
        demo: images (N, C, H, W) that the page may send; None: no buttons.
        policy: as shown on the page.
        hosts: names and addresses that clients may call the service, beside this machine's own for
            itself; "*": any.
    """

    model: ModelDescription
    max_body: int = 64 * 1024 * 1024
    body_memory: int = 512 * 1024 * 1024
    token: str = ""
    demo: np.ndarray | None = None
    policy: str = "coded"
    hosts: tuple[str, ...] = ()


class HostCheck:
    """Let requests through whose Host header is known.

    A page of another site that has its name lead here (DNS rebinding) would be taken for ours by
    the browser, and read what the service shows; but the browser says by what name it came.
    """

    def __init__(self, app: ASGIApp, hosts: tuple[str, ...]) -> None:
        self.app = app
        self.names = {*LOOPBACK, *(host.lower().strip("[]") for host in hosts)}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one connection."""
        if scope["type"] == "http":
            given = [value.decode("latin-1") for name, value in scope["headers"] if name == b"host"]
            for host in given:  # none: no browser
                if not self.known(host):
                    message = f"host {short(host)} is not known here; see --allowed-host"
                    await problem(421, message)(scope, receive, send)
                    return
        await self.app(scope, receive, send)

    def known(self, host: str) -> bool:
        """Tell whether a Host header, with or without a port, names this service."""
        name = re.sub(r":\d*$", "", host.lower())
        if name.startswith("[") and name.endswith("]"):
            name = name[1:-1]
        if name in self.names or "*" in self.names:
            return True
        if self.names.isdisjoint(ANY_ADDRESS):
            return False
        try:  # an address cannot be made to lead elsewhere
            ipaddress.ip_address(name)
        except ValueError:
            return False
        return True


class TokenCheck:
    """Let requests through that carry the token; health checks and the bare page need none."""

    OPEN = ("/v2/health/live", "/v2/health/ready", "/")

    def __init__(self, app: ASGIApp, token: str) -> None:
        self.app = app
        self.expected = token.encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one connection."""
        if scope["type"] == "http" and scope["path"] not in self.OPEN:
            given = dict(scope["headers"]).get(b"authorization", b"")
            scheme, _, token = given.partition(b" ")
            right = hmac.compare_digest(token.strip(), self.expected)
            if scheme.lower() != b"bearer" or not right:
                message = "a bearer token is needed: Authorization: Bearer TOKEN"
                response = problem(401, message, {"WWW-Authenticate": "Bearer"})
                await response(scope, receive, send)
                return
        await self.app(scope, receive, send)


class RequestCount:
    """Count inference requests by the status code that they got."""

    def __init__(self, app: ASGIApp, counter: Counter) -> None:
        self.app, self.counter = app, counter

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one connection."""
        if scope["type"] != "http" or not scope["path"].endswith("/infer"):
            await self.app(scope, receive, send)
            return

        started = False

        async def counted(message: Message) -> None:
            nonlocal started
            if message["type"] == "http.response.start":
                started = True
                self.counter.labels(str(message["status"])).inc()
            await send(message)

        try:
            await self.app(scope, receive, counted)
        except Exception:  # which is answered by who called us
            if not started:
                self.counter.labels("500").inc()
            raise


def problem(status: int, message: str, headers: dict[str, str] | None = None) -> JSONResponse:
    """Return an error response."""
    return JSONResponse({"error": message}, status_code=status, headers=headers)


Handler = Callable[[Request, Any], Awaitable[Response]]


class TooSlow(Exception):
    """A request's body did not come in time."""


async def read_body(
    request: Request, limit: int, seconds: float, arrived: Callable[[int], None]
) -> bytes:
    """Read a request's body.

    Args:
        request: its.
        limit: bytes, at most.
        seconds: in which it must be here.
        arrived: is told how many bytes are here, and may raise.

    Raises:
        TooLarge: if it has more than `limit` bytes.
        TooSlow: if it is not here after so many seconds; its client may be gone without a word.
    """

    async def read() -> bytes:
        parts, size = [], 0
        async for part in request.stream():
            size += len(part)
            if size > limit:
                raise TooLarge(f"body: more than {limit} bytes")
            arrived(size)
            parts.append(part)
        return b"".join(parts)

    try:
        return await asyncio.wait_for(read(), seconds)
    except asyncio.TimeoutError:
        raise TooSlow(f"body: not here after {seconds:g} s") from None


async def departure(receive: Receive) -> None:
    """Return when the client of a request, whose body has been read, goes away."""
    try:
        while (await receive())["type"] != "http.disconnect":
            pass
    except Exception as error:  # a server that cannot tell: the client may well be there
        log_event("disconnects are not noticed", logging.WARNING, reason=repr(error))
        await asyncio.Event().wait()


def problems(front: FrontEnd) -> dict[Any, Handler]:
    """Return how every kind of error is answered."""

    async def http_problem(_: Request, error: HTTPException) -> Response:
        return problem(error.status_code, str(error.detail), dict(error.headers or {}))

    async def internal(request: Request, error: Exception) -> Response:
        reason = f"{type(error).__name__}: {error}"
        log_event("internal error", logging.ERROR, path=request.url.path, reason=reason)
        return problem(500, f"internal error: {type(error).__name__}")

    async def no_room(_: Request, error: Exception) -> Response:
        reasons = {Overloaded: "overloaded", Draining: "shutting down", Starting: "starting"}
        message = f"{reasons[type(error)]}: try again later"
        seconds = error.seconds if isinstance(error, Overloaded) else RETRY_AFTER
        return problem(503, message, {"Retry-After": str(seconds)})

    async def too_late(_: Request, __: DeadlinePassed) -> Response:
        front.metrics.queries.labels("deadline").inc()
        return problem(504, "deadline passed")

    async def client_left(_: Request, __: ClientDisconnect) -> Response:
        return Response(status_code=499)  # nobody reads it

    async def too_slow(_: Request, error: TooSlow) -> Response:
        return problem(408, str(error), {"Connection": "close"})  # the rest may still come

    async def bad_request(_: Request, error: BadRequest) -> Response:
        return problem(413 if isinstance(error, TooLarge) else 400, str(error))

    return {
        HTTPException: http_problem,
        Exception: internal,
        **dict.fromkeys((Overloaded, Draining, Starting), no_room),
        DeadlinePassed: too_late,
        ClientDisconnect: client_left,
        TooSlow: too_slow,
        BadRequest: bad_request,
    }


def build_app(front: FrontEnd, options: AppOptions, *, starts: bool = True) -> Starlette:
    """Return the application; it stops the front end in the end.

    Args:
        front: answers the queries.
        options: see `AppOptions`.
        starts: start the front end, too, before anything is answered. Otherwise the caller does,
            and until then queries are refused.
    """
    model = options.model
    # Reading and writing what is large hold the interpreter for a while, and take memory.
    large = asyncio.Semaphore(1)
    held_by_all = 0  # bytes of requests: of their bodies, then of their images

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

    def is_ready() -> bool:
        return front.ready and front.scheduler.workers_up > 0

    async def ready(_: Request) -> Response:
        up = is_ready()
        return JSONResponse({"ready": up}, status_code=200 if up else 503)

    async def server(_: Request) -> Response:
        return JSONResponse(server_metadata(version("codedinvnet")))

    def check_model(request: Request) -> None:
        name = request.path_params["name"]
        model_version = request.path_params.get("model_version", VERSION)
        if name != model.name or model_version != VERSION:
            raise HTTPException(
                404, f"no model {name!r} version {model_version!r}; there is {model.name!r} 1"
            )

    async def metadata(request: Request) -> Response:
        check_model(request)
        return JSONResponse(model_metadata(model))

    async def model_ready(request: Request) -> Response:
        check_model(request)
        up = is_ready()
        return JSONResponse({"name": model.name, "ready": up}, status_code=200 if up else 503)

    async def parse_in_turn(
        parse: Callable[[], InferRequest], began: float, gone: asyncio.Task[None]
    ) -> InferRequest:
        """Parse in a thread, one request at a time, and none for nothing.

        Raises:
            Overloaded: if too many queries are waiting.
            DeadlinePassed: if the turn comes too late.
            ClientDisconnect: if nobody waits for it any more.
        """
        async with large:
            if gone.done():
                raise ClientDisconnect
            front.check_room(1)
            if time.monotonic() - began > front.deadline:
                raise DeadlinePassed(DEADLINE)
            return await asyncio.to_thread(parse)

    @contextlib.contextmanager
    def holding() -> Iterator[Callable[[int], None]]:
        """Yield a function that says how many bytes a request holds, and refuses too many."""
        nonlocal held_by_all
        held = 0

        def hold(size: int) -> None:
            nonlocal held_by_all, held
            if held_by_all - held + size > options.body_memory:
                front.refuse(1)
            held_by_all, held = held_by_all - held + size, size

        try:
            yield hold
        finally:
            held_by_all -= held

    async def take_in(
        request: Request, began: float, hold: Callable[[int], None]
    ) -> tuple[InferRequest, asyncio.Task[None]]:
        """Read and parse a request; also return a task that ends when its client goes away."""
        headers = request.headers
        packed = "content-encoding" in headers
        most = options.max_body
        if HEADER_LENGTH not in headers:
            most = min(most, model.json_bytes)
        body = await read_body(request, most, front.deadline, hold)

        def parse() -> InferRequest:
            plain = decompress(body, headers.get("content-encoding"), most)
            return parse_request(plain, headers.get(HEADER_LENGTH), model)

        gone = asyncio.create_task(departure(request.receive))
        try:
            if len(body) < LARGE_BODY and not packed:
                parsed = parse()
            else:
                parsed = await parse_in_turn(parse, began, gone)
            hold(parsed.images.nbytes)
        except BaseException:
            gone.cancel()
            raise
        return parsed, gone

    async def infer(request: Request) -> Response:
        check_model(request)
        began = time.monotonic()
        front.check_room(1)  # before its body takes any
        with holding() as hold:
            return await respond(request, began, hold)

    async def respond(request: Request, began: float, hold: Callable[[int], None]) -> Response:
        parsed, gone = await take_in(request, began, hold)
        try:
            if not parsed.accept_decoded and not front.scheduler.systematic:
                raise BadRequest("parameters.accept_decoded: this method has no direct answers")
            if gone.done():
                raise ClientDisconnect
            found = await front.infer(
                parsed.images,
                accept_decoded=parsed.accept_decoded,
                deadline=parsed.timeout,
                began=began,
                gone=gone,
                name=None if parsed.identity is None else parsed.identity[:LONGEST_SHOWN],
            )
            if gone.done():
                raise ClientDisconnect
        finally:
            gone.cancel()
        answers = [answer for answer in found if isinstance(answer, Answered)]
        if len(answers) < len(found):
            return failed(found)
        packs = wants_gzip(request.headers.get("accept-encoding", ""))

        def write() -> Response:
            return written(parsed, answers, model, packs)

        if len(answers) * len(model.classes) < LARGE_ANSWER:
            return write()
        async with large:
            return await asyncio.to_thread(write)

    async def metrics(_: Request) -> Response:
        front.update_gauges()
        return Response(front.metrics.render(), media_type="text/plain; version=0.0.4")

    async def times(_: Request) -> Response:
        def written() -> bytes:  # in a thread: ten thousands of numbers
            return json.dumps(front.times.report()).encode()

        return Response(await asyncio.to_thread(written), media_type="application/json")

    page = (resources.files("codedinvnet.serving") / "page.html").read_text(encoding="utf-8")

    async def index(_: Request) -> Response:
        return HTMLResponse(page, headers=NO_FRAMES)

    async def state(_: Request) -> Response:
        return JSONResponse(page_state(front, options))

    routes = [
        Route(f"/v2/models/{{name}}{version_part}{path}", endpoint, methods=[verb])
        for version_part in ("", "/versions/{model_version}")
        for path, endpoint, verb in (
            ("/infer", infer, "POST"),
            ("", metadata, "GET"),
            ("/ready", model_ready, "GET"),
        )
    ]
    routes += [
        Route("/v2/health/live", live),
        Route("/v2/health/ready", ready),
        Route("/v2", server),
        Route("/metrics", metrics),
        Route("/times", times),
        Route("/", index),
        Route("/page/state", state),
    ]
    if options.demo is not None:
        routes += demo_routes(front, options.demo)
    middleware = [
        Middleware(RequestCount, counter=front.metrics.requests),
        Middleware(HostCheck, hosts=options.hosts),
    ]
    if options.token:
        middleware.append(Middleware(TokenCheck, token=options.token))
    app = Starlette(
        routes=routes,
        middleware=middleware,
        exception_handlers=problems(front),
        lifespan=lifespan,
    )
    app.router.redirect_slashes = False
    return app


def written(
    parsed: InferRequest, answers: list[Answered], model: ModelDescription, packs: bool
) -> Response:
    """Return the response with a request's answers, compressed if that pays and may be."""
    data, head = render_response(parsed, answers, model)
    kind = "application/json" if head is None else "application/octet-stream"
    extra = {} if head is None else {HEADER_LENGTH: str(head)}
    if len(data) >= COMPRESSED_FROM:
        extra["Vary"] = "Accept-Encoding"
        if packs:
            data = gzip.compress(data, 1)
            extra["Content-Encoding"] = "gzip"
    work = max((answer.work_seconds for answer in answers), default=0.0)
    extra["Server-Timing"] = f"work;dur={1000 * work:.3f}"  # as the W3C's header, in ms
    return Response(data, media_type=kind, headers=extra)


def wants_gzip(accepted: str) -> bool:
    """Tell whether an Accept-Encoding header asks for gzip; a weight of 0 forbids it."""
    for part in accepted.lower().split(","):
        coding, _, weight = part.partition(";")
        if coding.strip() == "gzip":
            return not re.fullmatch(r"q=0(\.0*)?", weight.replace(" ", ""))
    return False


def failed(found: list[Any]) -> Response:
    """Return the response of a request of which not every query was answered."""
    problems = [problem for problem in found if not isinstance(problem, Answered)]
    if all(isinstance(p, DeadlinePassed) for p in problems):
        return problem(504, f"{len(problems)} of {len(found)} queries: deadline passed")
    reason = next(p for p in problems if not isinstance(p, DeadlinePassed))
    return problem(500, f"{len(problems)} of {len(found)} queries failed: {reason}")


def page_state(front: FrontEnd, options: AppOptions) -> dict[str, Any]:
    """Return what the page shows."""
    scheduler, now = front.scheduler, time.monotonic()
    return {
        "model": options.model.name,
        "classes": options.model.classes,
        "image_shape": options.model.image_shape,
        "policy": options.policy,
        "k": scheduler.code.k,
        "demo": options.demo is not None,
        "throughput": round(front.metrics.throughput(), 1),
        "percentiles": front.metrics.percentiles(),
        "answers": {
            outcome: int(front.metrics.queries.labels(outcome)._value.get()) for outcome in OUTCOMES
        },
        "agreement": front.metrics.live_agreement(),
        "workers": [
            {
                "state": "silent" if silent(scheduler.busy_since(i), now) else view.state,
                "queue": scheduler.load(i),
                "tasks": view.tasks,
                "restarts": view.restarts,
                "pid": None if view.state == STARTING else front.pool.pid(i),
            }
            for i, view in enumerate(front.workers)
        ],
        "groups": [
            {
                "id": view.identity,
                "members": [
                    {"image": encode_image(image), "outcome": view.outcomes.get(query, "waiting")}
                    for query, image in zip(view.members, view.images, strict=True)
                ],
            }
            for view in front.groups
        ],
    }


def silent(busy_since: float | None, now: float) -> bool:
    """Tell whether a worker has been at one task for a suspiciously long time."""
    return busy_since is not None and now - busy_since > SILENT_AFTER


def encode_image(image: np.ndarray) -> str:
    """Return an image's pixels (C, H, W) as base64 of bytes."""
    pixels = image if image.dtype == np.uint8 else (image * 255).round().astype(np.uint8)
    return base64.b64encode(pixels.tobytes()).decode()


def demo_routes(front: FrontEnd, images: np.ndarray) -> list[Route]:
    """Return those of the buttons: slow, stop, kill and heal a worker, and images to send."""
    pool = front.pool

    async def demo_images(_: Request) -> Response:
        return JSONResponse([encode_image(image) for image in images])

    async def do(request: Request) -> Response:
        name, deed = request.path_params["worker"], request.path_params["deed"]
        if request.headers.get(DEMO_HEADER) != "1":
            raise HTTPException(403, f"the header {DEMO_HEADER}: 1 is needed")
        if name not in map(str, range(front.rules.workers)) or not isinstance(pool, FaultyPool):
            raise HTTPException(404, f"no worker {name}")
        worker = int(name)
        if front.workers[worker].state == STARTING:
            raise HTTPException(503, f"worker {worker} is starting")
        pid = pool.pid(worker)
        signals = {"kill": signal.SIGKILL, "stop": signal.SIGSTOP, "heal": signal.SIGCONT}
        if deed not in (*signals, "slow"):
            raise HTTPException(404, f"no deed {deed!r}: slow, stop, kill or heal")
        if pid is None and deed in ("kill", "stop"):
            up = front.workers[worker].state == "up"
            why = "runs on another machine: slow it instead" if up else "is being replaced"
            raise HTTPException(409, f"worker {worker} {why}")
        if deed in ("slow", "heal"):
            pool.clear(worker)
        if deed == "slow":
            pool.add(Fault(kind="slow", worker=worker, delay=Delay(ms=SLOW_MS)))
        elif pid is not None:
            with contextlib.suppress(ProcessLookupError):  # it has just ended
                os.kill(pid, signals[deed])
        log_event("demo", worker=worker, deed=deed)
        return JSONResponse({"worker": worker, "deed": deed})

    return [
        Route("/demo/images", demo_images),
        Route("/demo/workers/{worker}/{deed}", do, methods=["POST"]),
    ]
