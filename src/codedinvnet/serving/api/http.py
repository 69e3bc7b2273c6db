"""The protocol over HTTP: inference, health, metadata, metrics, policy, and the page."""

from __future__ import annotations

import asyncio
import gzip
import json
import re
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from importlib.metadata import version
from typing import Any, TypeAlias

from codedinvnet.net.answers import Answers, Reply
from codedinvnet.net.background import Background
from codedinvnet.net.guard import STRANGE_PAGE, Guard
from codedinvnet.net.http1 import Field, RequestHead
from codedinvnet.net.protocol import http
from codedinvnet.net.protocol.messages import (
    HEADER_LENGTH,
    InferRequest,
    ProtocolError,
    server_metadata,
)
from codedinvnet.net.requests import Request
from codedinvnet.serving.answers import QueryFailed
from codedinvnet.serving.api.bodies import LARGE, BodyMemory
from codedinvnet.serving.api.errors import LEFT, ClientGone, HttpError, problem
from codedinvnet.serving.choices import Choices
from codedinvnet.serving.service import DIRECT, InferenceService, ServedResponse
from codedinvnet.serving.tracing import RequestSpan, Tracing

MODEL = r"/v2/models/([^/]+)(?:/versions/([^/]+))?"
INFER = re.compile(MODEL + "/infer")
COMPRESSED_FROM = 4096
"""Bytes of a response from which compressing it pays, for clients that ask."""
LARGE_ANSWER = 4096
"""Values of an answer from which it is written in a thread."""
SMALL_BODY = 4096
"""Bytes that the body of any other request may have."""
BODY_LENGTH = HEADER_LENGTH.lower().encode()
OPEN = re.compile(r"/|/v2/health/(live|ready)|/v2/models/[^/]+(/versions/[^/]+)?/ready")
"""Paths that need no token: those of probes, and the bare page."""
UNTRACED = nullcontext()

Endpoint: TypeAlias = Callable[[Request, re.Match[str]], Reply]
"""Answers a request whose path a pattern matches."""
Routes: TypeAlias = Mapping[str, Mapping[str, Endpoint]]
"""Pattern of paths -> method -> what answers."""


class Answering:
    """A request that is being answered."""

    __slots__ = ("left",)

    def __init__(self) -> None:
        self.left: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def gone(self) -> None:
        self.left.set_result(None)

    def pause(self) -> None:
        """Do nothing: the answer is sent as one."""

    def resume(self) -> None:
        """Do nothing."""


class HttpApi:
    """Answers one service's clients, as a handler of `HttpServer`."""

    def __init__(
        self,
        service: InferenceService,
        memory: BodyMemory,
        choices: Choices,
        guard: Guard,
        routes: Routes | None = None,
    ) -> None:
        self.service, self.memory, self.choices = service, memory, choices
        self.guard, self.dispatcher = guard, service.dispatcher
        self.requests = self.dispatcher.metrics.requests
        self.tracing: Tracing | None = None
        self.background = Background()
        own = {**self._routes(), **(routes or {})}
        self.routes = [(re.compile(path), endpoints) for path, endpoints in own.items()]

    # The server's handler

    def most_body(self, head: RequestHead) -> int:
        """Return how many bytes a request's body may have."""
        if not head.path.endswith("/infer"):
            return SMALL_BODY
        limits = self.service.limits
        return limits.body if BODY_LENGTH in head.known else limits.head

    def precheck(self, head: RequestHead) -> Reply | None:
        """Return why a request is refused before its body is read; None if it is not."""
        refusal = self.guard.refusal(head, OPEN.fullmatch(head.path) is not None)
        if refusal is not None:
            return refusal
        try:
            if head.chunked or (head.length or 0) > LARGE:  # smaller ones are read in any case
                self._inferred(head)
        except Exception as error:
            return problem(error, head.path).reply()
        return None

    def trusts(self, head: RequestHead) -> bool:
        """Return whether a request carries the token, if there is one."""
        return self.guard.trusts(head)

    def handle(self, client: Answers, request: Request) -> Answering:
        """Have a request answered."""
        call = Answering()
        self.background.spawn(self._answer(client, request, call.left))
        return call

    def replied(self, head: RequestHead | None, status: int, client: Answers | None = None) -> None:
        """Count the answer to an inference request."""
        if head is not None and head.path.endswith("/infer"):
            self.requests.labels(str(status)).inc()

    async def _answer(self, client: Answers, request: Request, gone: asyncio.Future[None]) -> None:
        reply = await self.respond(request, gone)
        if gone.done():
            self.replied(request.head, LEFT)
        else:
            client.reply(reply)

    async def respond(self, request: Request, gone: asyncio.Future[None]) -> Reply:
        """Return the answer to a request that `precheck` let through; errors are answers.

        Args:
            request: its body is counted as held until here.
            gone: done once its client is gone.
        """
        head = request.head
        with self._traced(head) as span:
            try:
                with self.memory.holding(request.size) as hold:
                    inferred = self._inferred(head)
                    reply = (
                        await self._infer(request, gone, hold) if inferred else self._route(request)
                    )
            except Exception as error:
                reply = problem(error, head.path).reply()
            if span is not None:
                span.ended(LEFT if gone.done() else reply.status)
        return reply

    def _traced(self, head: RequestHead) -> AbstractContextManager[RequestSpan | None]:
        """Return what traces a request meanwhile, if its like is traced."""
        if self.tracing is None or not head.path.endswith("/infer"):
            return UNTRACED
        names = ((k.decode(), v.decode("latin-1")) for k, v in head.known.items())
        method = head.method.decode()
        about = {"http.request.method": method, "url.path": head.path}
        return self.tracing.request(f"{method} infer", names, about)

    def _inferred(self, head: RequestHead) -> bool:
        """Return whether a request asks for inference; refuse it if that cannot be now."""
        found = INFER.fullmatch(head.path)
        if found is None:
            return False
        if head.method != b"POST":
            raise HttpError(405, "Method Not Allowed", (b"Allow", b" POST"))
        self.service.check_model(found[1], found[2])
        self.dispatcher.check_room(1)
        return True

    def _route(self, request: Request) -> Reply:
        """Return the answer to a request that is not for inference."""
        method = request.head.method.decode("latin-1")
        for path, endpoints in self.routes:
            if (found := path.fullmatch(request.head.path)) is not None:
                endpoint = endpoints.get("GET" if method == "HEAD" else method)
                if endpoint is None:
                    allowed = b" " + ", ".join(endpoints).encode()
                    raise HttpError(405, "Method Not Allowed", (b"Allow", allowed))
                if method == "POST" and not self.guard.is_own_page(request.head):
                    raise HttpError(403, STRANGE_PAGE)
                return endpoint(request, found)
        raise HttpError(404, "Not Found")

    # Inference

    async def _infer(
        self, given: Request, gone: asyncio.Future[None], hold: Callable[[int], None]
    ) -> Reply:
        """Answer an inference request."""
        service, known = self.service, given.head.known
        body = given.body[0] if len(given.body) == 1 else b"".join(given.body)
        length, coding, accepted = (
            known[name].decode("latin-1") if name in known else None
            for name in (BODY_LENGTH, b"content-encoding", b"accept-encoding")
        )

        def parse() -> InferRequest:
            return http.parse_request(body, length, coding, service.limits, service.check)

        if len(body) < LARGE and coding is None:
            request = parse()
        else:
            request = await self.memory.parse(parse, given.came, gone)
        hold(max(len(body), request.size))
        try:
            answer = await service.answer(request, given.came, gone)
        except QueryFailed:
            if gone.done():
                raise ClientGone from None
            raise
        packs = accepted is not None and wants_gzip(accepted)
        if answer.values < LARGE_ANSWER:
            return written(request, answer, packs)
        return await self.memory.write(lambda: written(request, answer, packs))

    # The rest

    def _routes(self) -> Routes:
        return {
            MODEL: {"GET": self._metadata},
            f"{MODEL}/ready": {"GET": self._model_ready},
            "/v2/health/live": {"GET": self._live},
            "/v2/health/ready": {"GET": lambda *_: self._readiness()},
            "/v2": {"GET": lambda *_: json_reply(server_metadata(version("codedinvnet")))},
            "/metrics": {"GET": self._metrics},
            "/policy": {"GET": self._policy, "POST": self._change_policy},
        }

    def _live(self, *_: object) -> Reply:
        alive = self.dispatcher.supervisor.is_live
        return json_reply({"live": alive}, 200 if alive else 503)

    def _readiness(self, **about: str) -> Reply:
        up = self.dispatcher.is_up
        return json_reply({**about, "ready": up}, 200 if up else 503)

    def _model_ready(self, _: Request, path: re.Match[str]) -> Reply:
        self.service.check_model(path[1], path[2])
        return self._readiness(name=path[1])

    def _metadata(self, _: Request, path: re.Match[str]) -> Reply:
        self.service.check_model(path[1], path[2])
        return json_reply(self.service.metadata.as_json())

    def _metrics(self, *_: object) -> Reply:
        self.dispatcher.update_gauges()
        return Reply(200, self.dispatcher.metrics.render(), "text/plain; version=0.0.4")

    def _policy(self, *_: object) -> Reply:
        return json_reply(self.choices.report(self.dispatcher.scheduler.chosen))

    def _change_policy(self, request: Request, _: object) -> Reply:
        refusal = self.guard.refusal_of_change(request.head)
        if refusal is not None:
            return refusal
        try:
            wanted = json.loads(b"".join(request.body))
        except (ValueError, RecursionError) as error:
            raise ProtocolError(f"the body is not JSON: {error}") from error
        name = wanted.get("policy") if isinstance(wanted, dict) else None
        if not isinstance(name, str):
            raise ProtocolError('the body must be an object, {"policy": NAME}')
        self.dispatcher.change_policy(self.choices.named(name))
        return self._policy()


def json_reply(value: Any, status: int = 200) -> Reply:
    """Return an answer in JSON."""
    return Reply(status, json.dumps(value).encode())


def written(request: InferRequest, answer: ServedResponse, packs: bool) -> Reply:
    """Return the response with a request's answers, compressed if that pays and may be."""
    data, head = http.render_response(answer.message, request)
    # As the W3C's header, in ms.
    fields: list[Field] = [(b"Server-Timing", b" work;dur=%.3f" % (1000 * answer.work_seconds))]
    if answer.outcome != DIRECT:  # as the gateway marks what is no upstream's own answer
        fields.append((b"codedinvnet-outcome", b" " + answer.outcome.encode()))
    if answer.agreement is not None:
        fields.append((b"codedinvnet-agreement", b" %.4f" % answer.agreement))
    kind = "application/json"
    if head is not None:
        kind = "application/octet-stream"
        fields.append((HEADER_LENGTH.encode(), b" %d" % head))
    if len(data) >= COMPRESSED_FROM:
        fields.append((b"Vary", b" Accept-Encoding"))
        if packs:
            data = gzip.compress(data, 1)
            fields.append((b"Content-Encoding", b" gzip"))
    return Reply(200, data, kind, fields)


def wants_gzip(accepted: str) -> bool:
    """Return whether an Accept-Encoding header asks for gzip; a weight of 0 forbids it."""
    for part in accepted.lower().split(","):
        coding, _, weight = part.partition(";")
        if coding.strip() == "gzip":
            return not re.fullmatch(r"q=0(\.0*)?", weight.replace(" ", ""))
    return False
