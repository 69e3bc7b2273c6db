"""Hedge requests in a client of httpx or httpx2, without a proxy.

    transport = HedgingTransport(["http://a:8000", "http://b:8000"], hedge=["POST /predict"])
    async with httpx.AsyncClient(transport=transport, base_url="http://model") as client:
        response = await client.post("/predict", json=...)

Each request goes to one of the upstreams. If the answer is late and the request is safe to repeat,
another upstream gets a copy, and the first answer wins. What the gateway knows of upstreams,
routes, streams and failures holds here as well: it is the same code.

The OpenAI and Anthropic clients use httpx2, the successor of httpx. Requests are answered with the
types of the module that they come from, and neither module is imported here.
"""

from __future__ import annotations

import asyncio
import sys
import threading
from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import ModuleType, TracebackType
from typing import TYPE_CHECKING, Any, Self, overload

from prometheus_client import CollectorRegistry

from codedinvnet.gateway.affinity import Affinity
from codedinvnet.gateway.attempts import HttpAttempt
from codedinvnet.gateway.calls import ENDS, Cause, Failure, State
from codedinvnet.gateway.cluster import Cluster, Endpoint
from codedinvnet.gateway.dispatcher import Dispatcher, Refused
from codedinvnet.gateway.metrics import GatewayMetrics
from codedinvnet.gateway.proxy import HttpCall
from codedinvnet.gateway.routes import Limits, Routes, is_stateful, read_rule
from codedinvnet.members.joining import digest, join_in, member_for
from codedinvnet.members.links import Links, own_folder
from codedinvnet.net.background import LoopThread
from codedinvnet.net.client import HttpClient, parse_origin
from codedinvnet.net.http1 import Fields, RequestHead, ResponseHead
from codedinvnet.net.memory import Memory
from codedinvnet.net.resolve import Resolver
from codedinvnet.scheduler.policies import HEDGE
from codedinvnet.scheduler.settings import FIRST_COPIES, Rules

if TYPE_CHECKING:
    import httpx
    import httpx2

LONGEST = 600.0
"""Seconds that replace a time-out of None until the first content."""
MOST_HELD = 1 << 18
"""Bytes of a stream that wait for the client at which the upstream is no longer read."""
ONE_CLIENT = "a HedgingTransport serves one client, in one event loop: create another"
LOOK = 0.02
"""Seconds between two looks at how much of a request has been sent."""
TIMEOUTS = {
    "pool": ("PoolTimeout", "no upstream was free"),
    "connect": ("ConnectTimeout", "no upstream was connected"),
    "write": ("WriteTimeout", "no upstream read on"),
    "read": ("ReadTimeout", "no content came"),
}
"""The time-outs of httpx: exception, and what did not happen in time."""


@dataclass(frozen=True)
class Stats:
    """What a transport has done so far.

    Attributes:
        requests: that were sent to an upstream, or waited for one.
        hedged: those of them that were answered after a copy had been sent.
        won: those of them that the copy answered.
        refused: copies for which the budget was too small.
    """

    requests: int
    hedged: int
    won: int
    refused: int


class _Attempt(HttpAttempt):
    @property
    def unsent(self) -> int:
        """Bytes of the request that the upstream has not taken yet."""
        connection = self._connection
        return 0 if connection is None else connection.transport.get_write_buffer_size()


class _Call(HttpCall):
    """Tells its client how far it has come."""

    client: _Answer

    def attempt(self, endpoint: Endpoint, number: int) -> HttpAttempt:
        if not self.attempts:
            self.client.limit("connect")
        return _Attempt(self, endpoint, number)

    def request(self, attempt: HttpAttempt) -> list[bytes]:
        if not self.written:
            self.client.limit("write")
        return super().request(attempt)

    def unsent(self) -> int:
        """Return the bytes of the request that no upstream has taken yet."""
        running = [each for each in self.attempts if each.state not in (State.CONNECT, *ENDS)]
        return min((each.unsent for each in running if isinstance(each, _Attempt)), default=0)


class _Answer:
    """The client of a call: takes the answer, and keeps it until it is read.

    Args:
        memory: counts what requests hold.
        request: the client's.
    """

    def __init__(self, memory: Memory, request: httpx.Request | httpx2.Request) -> None:
        self.memory, self.request, self.module = memory, request, _module(request)
        given: dict[str, float | None] = request.extensions.get("timeout", {})
        self._between = given.get("read")
        """Seconds between two parts of the body."""
        self.limits = {phase: LONGEST for phase in TIMEOUTS}
        self.limits.update((key, each) for key, each in given.items() if each is not None)
        self.call: _Call | None = None
        self._loop = asyncio.get_running_loop()
        self._head: asyncio.Future[ResponseHead] = self._loop.create_future()
        self._timer: asyncio.TimerHandle | None = None
        self._parts: list[bytes] = []
        self._size, self._broke, self.is_complete = 0, False, False
        self._more = asyncio.Event()

    # From the call

    def respond(
        self,
        head: ResponseHead,
        added: Fields,
        body: Sequence[bytes],
        trailers: Fields,
        is_complete: bool,
    ) -> None:
        self._parts += body
        self.is_complete = is_complete
        if not self._head.done():
            self._head.set_result(head)

    def send_body(self, data: bytes) -> None:
        self._parts.append(data)
        self._size += len(data)
        self._more.set()
        if self._size > MOST_HELD and self.call is not None:
            self.call.pause()

    def end_body(self, trailers: Fields) -> None:
        self.is_complete = True
        self._more.set()

    def abort(self, last: bytes = b"") -> None:
        self._broke = True
        self.end_body([])

    def refuse(self, status: int, reason: str, retry_after: int = 0) -> None:
        if not self._head.done():
            kind = "ReadTimeout" if status == 504 else "ConnectError"
            self._head.set_exception(self.error(kind, reason))

    def limit(self, phase: str) -> None:
        """Fail if the call stays longer in a phase than the client allows."""
        if self._timer is not None:
            self._timer.cancel()
        if phase == "write":
            self._timer = self._loop.call_later(LOOK, self._watch_writing, 0, self._loop.time())
        else:
            self._timer = self._loop.call_later(self.limits[phase], self._end, phase)

    def _watch_writing(self, before: int, since: float) -> None:
        """Fail if upstreams take nothing for too long; await the answer once one has it all."""
        assert self.call is not None
        now, left = self._loop.time(), self.call.unsent()
        since = since if left == before else now
        if not left:
            self.limit("read")
        elif now - since >= self.limits["write"]:
            self._end("write")
        else:
            self._timer = self._loop.call_later(LOOK, self._watch_writing, left, since)

    def _end(self, phase: str) -> None:
        if not self._head.done():
            self._head.set_exception(self.late(phase))

    # To the caller

    def error(self, kind: str, reason: str) -> Exception:
        """Return an exception of the client's module."""
        found: Exception = getattr(self.module, kind)(reason, request=self.request)
        return found

    def late(self, phase: str) -> Exception:
        """Return the exception of a time-out."""
        kind, reason = TIMEOUTS[phase]
        return self.error(kind, f"{reason} for {self.limits[phase]:g} s")

    async def head(self) -> ResponseHead:
        """Return the head of the answer.

        Raises:
            Exception: of the client's module: there is no answer, or none in time.
        """
        try:
            return await self._head
        except BaseException as error:
            self.hang_up(is_late=isinstance(error, self.module.TimeoutException))
            raise
        finally:
            if self._timer is not None:
                self._timer.cancel()

    async def more(self) -> list[bytes]:
        """Return the next parts of the body, once there are some; none at its end.

        Raises:
            Exception: of the client's module: the rest does not come, or nothing in time.
        """
        if not self._parts and not self.is_complete:
            self._more.clear()
            if self.call is not None:
                self.call.resume()
            try:
                await asyncio.wait_for(self._more.wait(), self._between)
            except TimeoutError:
                self.hang_up()
                raise self.late("read") from None
        return self.take()

    def take(self) -> list[bytes]:
        """Return the parts that are here.

        Raises:
            Exception: of the client's module: there are none, and the rest does not come.
        """
        parts, self._parts, self._size = self._parts, [], 0
        if not parts and self._broke:
            raise self.error("RemoteProtocolError", "the upstream failed in mid-stream")
        return parts

    def response(self, head: ResponseHead, body: Any) -> httpx.Response | httpx2.Response:
        """Return a response of the client's module."""
        headers = [(name, value.strip()) for name, value in head.fields]
        found: httpx.Response | httpx2.Response
        found = self.module.Response(head.status, headers=headers, stream=body)
        return found

    def hang_up(self, is_late: bool = False) -> None:
        """End the call; upstreams learn of it, as their connections are closed.

        If it is late, those that have answered nothing since it was sent are to blame.
        """
        call = self.call
        if call is None or self.is_complete:
            return
        waiting = [attempt for attempt in call.attempts if not attempt.is_over]
        call.gone()
        for attempt in waiting:
            if is_late and attempt.endpoint.heard < attempt.began:
                failure = Failure(Cause.SILENT, "no answer before the client's time-out")
                call.dispatcher.cluster.blame(attempt.endpoint, failure)


class _AsyncBody:
    """The body of an answer to an asynchronous client."""

    def __init__(self, answer: _Answer) -> None:
        self._answer = answer

    async def __aiter__(self) -> AsyncIterator[bytes]:
        while parts := await self._answer.more():
            for part in parts:
                yield part

    async def aclose(self) -> None:
        self._answer.hang_up()


class _Body:
    """The body of an answer to a synchronous client."""

    def __init__(self, answer: _Answer, thread: LoopThread) -> None:
        self._answer, self._thread = answer, thread

    def __iter__(self) -> Iterator[bytes]:
        answer, thread = self._answer, self._thread
        while parts := answer.take() if answer.is_complete else thread.run(answer.more()):
            yield from parts

    def close(self) -> None:
        if not self._answer.is_complete:
            self._thread.run(self._hang_up())

    async def _hang_up(self) -> None:
        self._answer.hang_up()


def _module(request: httpx.Request | httpx2.Request) -> ModuleType:
    """Return httpx or httpx2."""
    for kind in type(request).__mro__:  # a request may be of a subclass
        name = kind.__module__.partition(".")[0]
        if name in ("httpx", "httpx2"):
            return sys.modules[name]
    raise TypeError(f"{request!r} is not a request of httpx or httpx2")


@cache
def _of_module(body: type, module: ModuleType, base: str) -> Any:
    """Return a class of bodies that a module's client takes: it insists on its own base class."""
    return type(body.__name__, (body, getattr(module, base)), {})


if TYPE_CHECKING:

    class _Transport(  # type: ignore[misc]  # the overloads below reconcile the two modules
        httpx.AsyncBaseTransport,
        httpx2.AsyncBaseTransport,
        httpx.BaseTransport,
        httpx2.BaseTransport,
    ): ...

else:
    _Transport = object


class HedgingTransport(_Transport):
    """Send requests to several servers that give the same answers.

    It serves one client of httpx or httpx2: an asynchronous one, on asyncio, or a synchronous one,
    whose requests are sent by a thread that runs until the client is closed.

    A request with `extensions={"hedge": False}` or the header `x-hedge: off` gets no copy, and is
    sent again only if its connection was refused. A call is cancelled if its task is, if it takes
    too long, or if its response is closed early; servers learn of it by closed connections.

    Args:
        urls: base URLs. They replace scheme and host of what the client asks for.
        hedge: requests that are safe to send twice besides the built-in ones: one or several of
            "METHOD GLOB".
        no_hedge: requests that are not, whatever the other rules say.
        health: the path that is probed; None: V2's readiness where it exists, else a connection.
        budget: copies per request, at most.
        slots: concurrent requests per upstream, at most; others wait. None: found for each.
        cancel: whether connections of attempts that nobody waits for are closed, for servers that
            stop working then; None: those of streams are, and those of calls that were cancelled.
        affinity: what tells which server has cached the beginning of a prompt: "prefix", the name
            of a header with a session, "cookie:NAME" or "body:FIELD". None: nothing.
        members: a folder that transports in processes of this machine have in common: those with
            the same servers and rules decide as one. It is made if it isn't there, for this user
            alone. None: this one decides alone.

    Attributes:
        metrics: the counters and times of a gateway, as a registry of `prometheus_client`.

    Raises:
        UserError: if a URL, a rule or `affinity` is none, or the folder cannot be used.
    """

    def __init__(
        self,
        urls: Sequence[str],
        *,
        hedge: str | Sequence[str] = (),
        no_hedge: str | Sequence[str] = (),
        health: str | None = None,
        budget: float = 0.1,
        slots: int | None = None,
        cancel: bool | None = None,
        affinity: str | None = None,
        members: str | Path | None = None,
    ) -> None:
        rules = [
            read_rule(rule, name)._replace(is_repeatable=name == "hedge")
            for name, given in (("no_hedge", no_hedge), ("hedge", hedge))
            for rule in ([given] if isinstance(given, str) else given)
        ]
        for url in urls:
            parse_origin(url, "urls")
        self._urls, self._health, self._metrics = tuple(urls), health, GatewayMetrics()
        self._routes = Routes(rules, self._metrics, Limits(LONGEST))
        self._memory = Memory(1 << 62)
        self._cancel = cancel
        self._affinity = None if affinity is None else Affinity(affinity, "affinity")
        self._members = None if members is None else own_folder(members, "members")
        common = (sorted(urls), rules, health, budget, slots, cancel, affinity)
        self._digest = digest({"transport": common})
        self._links: Links | None = None
        self._rules = Rules(
            len(urls),
            HEDGE,
            hang_timeout=10 * LONGEST,  # the dispatcher ends attempts before
            hedge_share=budget,
            head_start=FIRST_COPIES,
            max_pending=1_000_000,
            slots=slots,
        )
        self.metrics: CollectorRegistry = self._metrics.registry
        self._starting: asyncio.Task[Dispatcher] | None = None
        self._requests = 0
        self._thread: LoopThread | None = None
        self._lock = threading.Lock()

    @property
    def stats(self) -> Stats:
        """What it has done so far."""
        routes = self._routes.all()
        won, lost, refused = (
            sum(route.hedge_counts[result] for route in routes)
            for result in ("won", "lost", "refused")
        )
        return Stats(self._requests, won + lost, won, refused)

    # The interface of httpx and httpx2

    @overload
    async def handle_async_request(self, request: httpx.Request) -> httpx.Response: ...
    @overload
    async def handle_async_request(self, request: httpx2.Request) -> httpx2.Response: ...
    async def handle_async_request(
        self, request: httpx.Request | httpx2.Request
    ) -> httpx.Response | httpx2.Response:
        answer, head = await self._ask(request, await request.aread())
        body = _of_module(_AsyncBody, answer.module, "AsyncByteStream")
        return answer.response(head, body(answer))

    @overload
    def handle_request(self, request: httpx.Request) -> httpx.Response: ...
    @overload
    def handle_request(self, request: httpx2.Request) -> httpx2.Response: ...
    def handle_request(
        self, request: httpx.Request | httpx2.Request
    ) -> httpx.Response | httpx2.Response:
        with self._lock:
            if self._thread is None and self._starting is not None:
                raise RuntimeError(ONE_CLIENT)
            if self._thread is None:
                self._thread = LoopThread("codedinvnet hedging")
        answer, head = self._thread.run(self._ask(request, request.read()))
        body = _of_module(_Body, answer.module, "SyncByteStream")
        return answer.response(head, body(answer, self._thread))

    async def aclose(self) -> None:
        if self._starting is None:
            return
        dispatcher = await self._starting
        calls = (attempt.call for attempt in dispatcher.attempts.values())
        for call in {*dispatcher.calls.values(), *calls}:
            if call.waits:
                call.fail(502, "the transport was closed")
            elif not call.is_over:
                call.break_off()
        if self._links is not None:
            await self._links.stop()
        await dispatcher.stop()

    def close(self) -> None:
        if self._thread is not None:
            self._thread.run(self.aclose())
            self._thread.stop()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None = None,
        error: BaseException | None = None,
        traceback: TracebackType | None = None,
    ) -> None:
        await self.aclose()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None = None,
        error: BaseException | None = None,
        traceback: TracebackType | None = None,
    ) -> None:
        self.close()

    # What both kinds of clients share

    async def _start(self) -> Dispatcher:
        resolver = Resolver()
        cluster = Cluster(
            lambda url: HttpClient(parse_origin(url), None, resolver),
            len(self._urls),
            self._metrics,
            self._health,
        )
        cluster.fill(self._urls)
        joins = None if self._members is None else member_for
        dispatcher = Dispatcher(self._rules, cluster, self._metrics, self._cancel, joins)
        await dispatcher.start()
        if self._members is not None and dispatcher.member is not None:
            self._links = await join_in(self._members, dispatcher.member, self._digest, resolver)
        return dispatcher

    async def _ask(
        self, request: httpx.Request | httpx2.Request, body: bytes
    ) -> tuple[_Answer, ResponseHead]:
        """Send a request; return the answer once its first content is here."""
        answer = _Answer(self._memory, request)
        if request.url.is_relative_url:
            why = f"{request.url} has no host: create the client with base_url='http://model'"
            raise answer.error("UnsupportedProtocol", why)
        loop = asyncio.get_running_loop()
        if self._starting is None:
            self._starting = loop.create_task(self._start())
        elif self._starting.get_loop() is not loop:
            raise RuntimeError(ONE_CLIENT)
        try:
            starting = asyncio.shield(self._starting)
            dispatcher = await asyncio.wait_for(starting, answer.limits["connect"])
        except TimeoutError:
            raise answer.late("connect") from None
        fields = [(name, b" " + value) for name, value in request.headers.raw]
        head = RequestHead(request.method.encode(), request.url.raw_path, fields, b"1")
        route = self._routes.find(head.method, head.target)
        is_wanted = request.extensions.get("hedge", True)
        repeatable = route.is_repeatable and is_wanted and request.headers.get("x-hedge") != "off"
        if repeatable and route.is_v2:
            repeatable = not is_stateful(head, [body])
        parts = [body] if body else []
        answer.call = call = _Call(answer, head, parts, [], route, repeatable, dispatcher)
        call.deadline = call.came + sum(answer.limits.values())
        if self._affinity is not None:
            call.prompt = self._affinity.prompt(head, parts)
        self._requests += 1
        answer.limit("pool")
        try:
            dispatcher.submit(call)
        except Refused as refused:
            call.fail(502, str(refused))
        return answer, await answer.head()
