"""Hedge requests in an httpx client, without a proxy.

    transport = HedgingTransport(["http://a:8000", "http://b:8000"], hedge=["POST /predict"])
    async with httpx.AsyncClient(transport=transport, base_url="http://model") as client:
        response = await client.post("/predict", json=image)

Each request goes to one of the upstreams. If the answer is late and the request is safe to repeat,
another upstream gets a copy, the first answer wins, and the loser's connection is closed. The
gateway's scheduler decides when an answer is late and how many copies the budget allows.
"""

from __future__ import annotations

import asyncio
import re
import time
from collections import Counter
from collections.abc import AsyncIterator, Coroutine, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from typing import Any

import httpx

from codedinvnet.scheduler.actions import DEADLINE, Action, Answer, Fail, Forget, Replace, Send
from codedinvnet.scheduler.budget import BUCKET, Budget
from codedinvnet.scheduler.policies import HEDGE
from codedinvnet.scheduler.scheduler import Scheduler
from codedinvnet.scheduler.settings import Rules

REPEATABLE = (
    "GET *",
    "HEAD *",
    "POST /v2/models/*/infer",
    "POST /v1/models/*:predict",
    "POST /predictions/*",
    "POST /invocations",
    "POST /v1/embeddings",
    "POST /v1/rerank",
)
"""Requests that are safe to send twice."""
STATEFUL = b'"sequence_id"', b'"shared_memory_region"'
"""A request whose body has one of these is tied to one server."""
SAYS = re.compile(
    rb'"(content|reasoning_content|refusal|name|arguments|finish_reason)"\s*:\s*"[^"]'
)
"""A chat's delta that carries more than a role."""
FAILURES = {429, 500, 502, 503, 504}
"""Statuses after which another upstream gets a repeatable request."""
RETRY_SHARE = 0.1
"""Failed requests that are sent again, per request."""
STRIKES = 3
"""So many failures in a row eject an upstream."""
EJECTED = 0.5, 10.0
"""Seconds that an upstream stays ejected, at first and at most."""
WHOLE = 1 << 20
"""A body of at most so many bytes is the answer once it is complete, another once it begins."""
LONGEST = 600.0
"""Seconds until the first content if the client sets no read timeout."""


@dataclass(eq=False)
class _Call:
    request: httpx.Request
    content: bytes
    repeatable: bool
    answer: asyncio.Future[httpx.Response]
    attempts: list[int] = field(default_factory=list)
    failed: set[int] = field(default_factory=set)
    """Upstreams that failed it."""
    broken: int = 0
    """How many connections broke over it."""
    detached: bool = False
    """Its only attempt runs on at an ejected upstream, and the scheduler has forgotten it."""
    refusal: httpx.Response | None = None
    """The last failure that an upstream answered with."""
    error: Exception = field(default_factory=lambda: httpx.ConnectError("no upstream is up"))


@dataclass(eq=False)
class _Upstream:
    url: httpx.URL
    failures: int = 0
    """In a row."""
    ejections: int = 0
    """Since its last success."""


class _Body(httpx.AsyncByteStream):
    """A response's body, the beginning of which has been read."""

    def __init__(self, begun: bytes, rest: AsyncIterator[bytes], origin: httpx.Response) -> None:
        self._begun, self._rest, self._origin = begun, rest, origin

    async def __aiter__(self) -> AsyncIterator[bytes]:
        yield self._begun
        async for chunk in self._rest:
            yield chunk

    async def aclose(self) -> None:
        await self._origin.aclose()


class HedgingTransport(httpx.AsyncBaseTransport):
    """Send requests to several servers that give the same answers; runs on asyncio.

    Args:
        urls: base URLs. They replace scheme and host of what the client asks for.
        hedge: requests that are safe to send twice besides `REPEATABLE`, as "METHOD GLOB".
        no_hedge: requests that are not, whatever the other rules say.
        budget: copies per request, at most.
        slots: concurrent requests per upstream, at most; others wait.
        transport: what sends a request; httpx's own by default.

    Attributes:
        stats: how many "requests" came, "hedges" were sent and "won", failed requests were sent
            again ("retries"), and upstreams ejected ("ejections").
    """

    def __init__(
        self,
        urls: Sequence[str],
        *,
        hedge: Sequence[str] = (),
        no_hedge: Sequence[str] = (),
        budget: float = 0.1,
        slots: int = 32,
        transport: httpx.AsyncBaseTransport | None = None,
    ) -> None:
        self._upstreams = [_Upstream(httpx.URL(url)) for url in urls]
        self._hedge, self._no_hedge = (*REPEATABLE, *hedge), tuple(no_hedge)
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=slots * len(urls))
        self._inner = transport or httpx.AsyncHTTPTransport(limits=limits)
        rules = Rules(len(urls), HEDGE, hedge_share=budget, slots=slots)
        limitless = replace(rules, hang_timeout=1e9, max_pending=10**9, max_losses=10**9)
        self._scheduler = Scheduler(limitless)  # what hangs is ejected here
        self._retries = Budget()
        self._retries.share, self._retries.tokens = RETRY_SHARE, BUCKET
        self._calls: dict[int, _Call] = {}
        self._running: dict[int, tuple[_Call, int, asyncio.Task[None]]] = {}
        self._responses: dict[int, httpx.Response] = {}
        self._background: set[asyncio.Task[None]] = set()
        self._timer: asyncio.TimerHandle | None = None
        self.stats: Counter[str] = Counter()

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        name = f"{request.method} {request.url.path}"
        named, refused = (
            any(fnmatchcase(name, rule) for rule in rules)
            for rules in (self._hedge, self._no_hedge)
        )
        repeatable = request.headers.pop("x-hedge", "on") != "off" and named and not refused
        content = await request.aread() if repeatable else b""
        repeatable = repeatable and not any(word in content for word in STATEFUL)
        call = _Call(request, content, repeatable, asyncio.get_running_loop().create_future())
        wait, now = request.extensions.get("timeout", {}).get("read"), time.monotonic()
        size = len(content).bit_length()
        taken = self._scheduler.submit(now, 1, now + (wait or LONGEST), size_class=size)
        assert taken is not None
        (query,), actions = taken
        self.stats["requests"] += 1
        self._retries.earn()
        self._calls[query] = call
        response = None
        try:
            self._do(actions)
            response = await call.answer
            return response
        finally:
            del self._calls[query]
            self._do(self._scheduler.cancel([query]))
            for attempt in call.attempts:
                self._stop(attempt)
            answered = call.answer.done() and not call.answer.cancelled()
            last = call.answer.result() if answered and not call.answer.exception() else None
            for unused in {call.refusal, last} - {response}:
                if unused is not None:  # its client was cancelled, or there is a better answer
                    self._spawn(unused.aclose())

    async def aclose(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        tasks = [*self._background, *(task for _, _, task in self._running.values())]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self._inner.aclose()

    def _do(self, actions: Sequence[Action]) -> None:
        """Carry out what the scheduler asks for."""
        loop, now = asyncio.get_running_loop(), time.monotonic()
        for action in actions:
            match action:
                case Send(worker=worker, attempt=attempt, members=(query,)):
                    self._send(worker, attempt, self._calls.get(query))
                case Answer(query=query, attempt=attempt):
                    call = self._calls[query]
                    self.stats["won"] += attempt != call.attempts[0] and not call.failed
                    _finish(call, self._responses.pop(attempt))
                case Fail(query=query, reason=reason) if not self._calls[query].detached:
                    call = self._calls[query]
                    late = httpx.ReadTimeout("no upstream answered in time")
                    _finish(call, call.refusal or (late if reason == DEADLINE else call.error))
                case Forget(attempts=attempts):
                    for unused in attempts:
                        if response := self._responses.pop(unused, None):
                            self._spawn(response.aclose())
                case Replace(worker=worker):
                    self._spawn(self._readmit(worker))
        if self._timer is not None:
            self._timer.cancel()
        if (at := self._scheduler.next_timer()) is not None:
            self._timer = loop.call_later(max(0.0, at - now), self._on_timer)

    def _on_timer(self) -> None:
        self._do(self._scheduler.on_timer(time.monotonic()))

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._background.add(task)
        task.add_done_callback(self._background.discard)

    def _send(self, worker: int, attempt: int, call: _Call | None) -> None:
        if call is None or (call.attempts and not call.repeatable):
            self._failed(attempt, "it must not be sent twice", final=True)
            return
        self.stats["hedges"] += any(each in self._running for each in call.attempts)
        call.attempts.append(attempt)
        task = asyncio.get_running_loop().create_task(self._attempt(call, worker, attempt))
        self._running[attempt] = call, worker, task

    def _failed(self, attempt: int, reason: str, final: bool = False) -> None:
        self._do(self._scheduler.failed(time.monotonic(), attempt, reason, final))

    def _stop(self, attempt: int) -> None:
        """Cancel an attempt that lost; the time it took so far tells who is slow."""
        if (found := self._running.pop(attempt, None)) is not None:
            found[2].cancel()
            self._do(self._scheduler.released(time.monotonic(), found[1], attempt))
            self._failed(attempt, "cancelled")

    async def _attempt(self, call: _Call, worker: int, attempt: int) -> None:
        upstream = self._upstreams[worker]
        try:
            response = await self._ask(call, upstream.url)
        except httpx.TransportError as error:
            del self._running[attempt]
            upstream.failures += 1
            call.error, reason = error, str(error)
            if call.detached:
                _finish(call, error)
            elif isinstance(error, (httpx.ConnectError, httpx.ConnectTimeout)):
                call.attempts.remove(attempt)  # nothing was sent
                if not self._eject(worker, reason):
                    self._failed(attempt, reason, final=True)
            else:
                call.broken += 1
                again = call.repeatable and call.broken < 2 and self._may_retry(call, worker)
                self._failed(attempt, reason, final=not again)
        else:
            del self._running[attempt]
            failed, reason = response.status_code in FAILURES, f"status {response.status_code}"
            upstream.failures = upstream.failures + 1 if failed else 0
            upstream.ejections *= failed
            if call.detached:
                _finish(call, response)
            elif (
                failed
                and call.repeatable
                and call.refusal is None
                and self._may_retry(call, worker)
            ):
                call.refusal = response
                self._failed(attempt, reason)
            else:
                self._responses[attempt] = response
                usual = response.is_success
                self._do(self._scheduler.result(time.monotonic(), attempt, is_usual=usual))
        if upstream.failures >= STRIKES:
            self._eject(worker, reason)

    async def _ask(self, call: _Call, base: httpx.URL) -> httpx.Response:
        """Return an upstream's response once its first content is here, or all of it if short."""
        asked = call.request
        path = base.raw_path.rstrip(b"/") + asked.url.raw_path
        where = {"scheme": base.scheme, "host": base.host, "port": base.port, "raw_path": path}
        headers = httpx.Headers(asked.headers)
        headers["host"] = base.netloc.decode()
        request = httpx.Request(
            asked.method,
            asked.url.copy_with(**where),
            headers=headers,
            stream=httpx.ByteStream(call.content) if call.repeatable else asked.stream,
            extensions=asked.extensions,
        )
        response = await self._inner.handle_async_request(request)
        assert isinstance(response.stream, httpx.AsyncByteStream)
        rest, begun = response.stream.__aiter__(), bytearray()
        whole = 0 <= int(response.headers.get("content-length", -1)) <= WHOLE
        is_events = response.headers.get("content-type", "").startswith("text/event-stream")
        try:
            async for chunk in rest:
                begun += chunk
                if not whole and (not is_events or has_content(begun)):
                    break
        except BaseException:
            await response.aclose()
            raise
        return httpx.Response(
            response.status_code,
            headers=response.headers,
            stream=_Body(bytes(begun), rest, response),
            extensions={**response.extensions, "upstream": str(base)},
        )

    def _may_retry(self, call: _Call, worker: int) -> bool:
        """Tell whether another upstream may get a request that this one failed."""
        call.failed.add(worker)
        up = {each for each in range(len(self._upstreams)) if self._scheduler.is_up(each)}
        allowed = bool(up - call.failed) and self._retries.pay(1.0)
        self.stats["retries"] += allowed
        return allowed

    def _eject(self, worker: int, reason: str) -> bool:
        """Send an upstream nothing for a while, unless it is the last; return whether it was."""
        if not self._scheduler.is_up(worker) or self._scheduler.workers_up == 1:
            return False
        self.stats["ejections"] += 1
        for attempt, (call, place, task) in list(self._running.items()):
            if place == worker:
                call.detached = not call.repeatable  # it stays where it is
                if call.repeatable:
                    del self._running[attempt]
                    task.cancel()
        self._do(self._scheduler.worker_lost(time.monotonic(), worker, reason))
        return True

    async def _readmit(self, worker: int) -> None:
        """Try an ejected upstream again after a while: its first failure ejects it once more."""
        upstream = self._upstreams[worker]
        await asyncio.sleep(min(EJECTED[0] * 2**upstream.ejections, EJECTED[1]))
        upstream.ejections += 1
        upstream.failures = STRIKES - 1
        self._do(self._scheduler.worker_up(time.monotonic(), worker))


def _finish(call: _Call, outcome: httpx.Response | Exception) -> None:
    if call.answer.done():
        return
    if isinstance(outcome, Exception):
        call.answer.set_exception(outcome)
    else:
        call.answer.set_result(outcome)


def has_content(events: bytes | bytearray) -> bool:
    """Tell whether server-sent events carry more than comments and a chat's role."""
    lines = events[: events.rfind(b"\n") + 1].splitlines()
    data = (line for line in lines if line.startswith(b"data:") and line[5:].strip())
    return any(b'"delta"' not in line or SAYS.search(line) for line in data)
