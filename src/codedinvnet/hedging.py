"""Hedge requests in an httpx client, without a proxy.

    transport = HedgingTransport(["http://a:8000", "http://b:8000"], hedge=["POST /predict"])
    async with httpx.AsyncClient(transport=transport, base_url="http://model") as client:
        response = await client.post("/predict", json=image)

Each request goes to one of the upstreams. If the answer is late and the request is safe to repeat,
another upstream gets a copy, and the first answer wins. What the gateway knows of upstreams,
routes, streams and failures holds here as well: it is the same code.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import AsyncIterator, Sequence

import httpx
from prometheus_client import CollectorRegistry

from codedinvnet.gateway.cluster import Cluster
from codedinvnet.gateway.dispatcher import Dispatcher, Refused, count_refused
from codedinvnet.gateway.metrics import GatewayMetrics
from codedinvnet.gateway.proxy import HttpCall
from codedinvnet.gateway.routes import Routes, is_stateful
from codedinvnet.net.client import HttpClient, parse_origin
from codedinvnet.net.http1 import Fields, RequestHead, ResponseHead
from codedinvnet.net.memory import Memory
from codedinvnet.net.resolve import Resolver
from codedinvnet.scheduler.policies import HEDGE
from codedinvnet.scheduler.settings import FIRST_COPIES, FIRST_DELAY, Rules

LONGEST = 600.0
"""Seconds until the first content if the client sets no read timeout."""
MOST_HELD = 1 << 18
"""Bytes of a stream that wait for the client at which the upstream is no longer read."""


class _Answer(httpx.AsyncByteStream):
    """Takes an answer where a gateway has its client's connection, and is its body.

    Args:
        memory: counts what requests hold.
        request: the client's.
    """

    def __init__(self, memory: Memory, request: httpx.Request) -> None:
        self.memory, self.request = memory, request
        self.call: HttpCall | None = None
        self.head: asyncio.Future[ResponseHead] = asyncio.get_running_loop().create_future()
        self._parts: list[bytes] = []
        self._size, self._ended, self._broke = 0, False, False
        self._more = asyncio.Event()

    def respond(
        self,
        head: ResponseHead,
        added: Fields,
        body: Sequence[bytes],
        trailers: Fields,
        is_complete: bool,
    ) -> None:
        """Take the beginning of an answer, or all of it; an upstream's own error is one."""
        self._parts += body
        self._ended = is_complete
        if not self.head.done():
            self.head.set_result(head)

    def send_body(self, data: bytes) -> None:
        """Take the next part of the body."""
        self._parts.append(data)
        self._size += len(data)
        self._more.set()
        if self._size > MOST_HELD and self.call is not None:
            self.call.pause()

    def end_body(self, trailers: Fields) -> None:
        """The body is complete."""
        self._ended = True
        self._more.set()

    def abort(self) -> None:
        """The upstream failed in mid-stream."""
        self._broke = True
        self.end_body([])

    def refuse(self, status: int, reason: str, retry_after: int = 0) -> None:
        """No upstream has an answer."""
        kinds = {502: httpx.ConnectError, 503: httpx.PoolTimeout, 504: httpx.ReadTimeout}
        if not self.head.done():
            kind = kinds.get(status, httpx.RemoteProtocolError)
            self.head.set_exception(kind(reason, request=self.request))

    async def __aiter__(self) -> AsyncIterator[bytes]:
        while True:
            parts, self._parts, self._size = self._parts, [], 0
            for part in parts:
                yield part
            if self._parts:
                continue
            if self._ended:
                break
            self._more.clear()
            if self.call is not None:
                self.call.resume()
            await self._more.wait()
        if self._broke:
            raise httpx.RemoteProtocolError("the upstream failed in mid-stream")

    async def aclose(self) -> None:
        if self.call is not None and not self._ended:
            self.call.gone()


class HedgingTransport(httpx.AsyncBaseTransport, httpx.BaseTransport):
    """Send requests to several servers that give the same answers; runs on asyncio.

    Args:
        urls: base URLs. They replace scheme and host of what the client asks for.
        hedge: requests that are safe to send twice besides the built-in ones: one or several of
            "METHOD GLOB".
        no_hedge: requests that are not, whatever the other rules say.
        health: the path that is probed; None: V2's readiness where it exists, else a connection.
        budget: copies per request, at most.
        slots: concurrent requests per upstream, at most; others wait. None: found for each.
        cancel: whether connections of attempts that lost are closed, for servers that stop working
            then; None: those of streams are.

    Attributes:
        metrics: the counters and times of a gateway, as a registry of `prometheus_client`.

    Raises:
        UserError: if a URL or a rule is none.
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
    ) -> None:
        hedge, no_hedge = ([r] if isinstance(r, str) else r for r in (hedge, no_hedge))
        for url in urls:
            parse_origin(url, "urls")
        self._urls, self._health, self._metrics = tuple(urls), health, GatewayMetrics()
        self._routes, self._memory = Routes(hedge, no_hedge, self._metrics), Memory(1 << 62)
        self._cancel = cancel
        self._rules = Rules(
            len(urls),
            HEDGE,
            hang_timeout=10 * LONGEST,  # the dispatcher ends attempts before
            hedge_share=budget,
            first_delay=FIRST_DELAY,
            head_start=FIRST_COPIES,
            max_pending=1_000_000,
            slots=slots,
        )
        self.metrics: CollectorRegistry = self._metrics.registry
        self._starting: asyncio.Task[Dispatcher] | None = None

    @property
    def hedges(self) -> Counter[str]:
        """How many copies won, lost, or were refused by the budget."""
        if self._starting is not None and self._starting.done():
            for route in self._routes.all():
                count_refused(route, [self._starting.result()])
        return sum((Counter(route.hedge_counts) for route in self._routes.all()), Counter())

    async def _start(self) -> Dispatcher:
        resolver = Resolver()
        cluster = Cluster(
            lambda url: HttpClient(parse_origin(url), None, resolver),
            len(self._urls),
            self._metrics,
            self._health,
        )
        cluster.fill(self._urls)
        dispatcher = Dispatcher(self._rules, cluster, self._metrics, LONGEST, self._cancel)
        await dispatcher.start()
        return dispatcher

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        raise TypeError("HedgingTransport needs asyncio: use it in an httpx.AsyncClient")

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        if request.url.is_relative_url:
            why = f"{request.url} has no host: create the client with base_url='http://model'"
            raise httpx.UnsupportedProtocol(why, request=request)
        if self._starting is None:
            self._starting = asyncio.get_running_loop().create_task(self._start())
        dispatcher = await asyncio.shield(self._starting)
        body = await request.aread()
        fields = [(name, b" " + value) for name, value in request.headers.raw]
        head = RequestHead(request.method.encode(), request.url.raw_path, fields, b"1")
        route = self._routes.find(head.method, head.target)
        repeatable = route.is_repeatable and request.headers.get("x-hedge") != "off"
        if repeatable and route.is_v2:
            repeatable = not is_stateful(head, [body])
        answer = _Answer(self._memory, request)
        parts = [body] if body else []
        call = HttpCall(answer, head, parts, [], route, repeatable, dispatcher)
        answer.call = call
        wait = request.extensions.get("timeout", {}).get("read")
        call.deadline = time.monotonic() + (wait or LONGEST)
        try:
            dispatcher.submit(call)
            found_head = await answer.head
        except Refused as refused:
            raise httpx.ConnectError(str(refused), request=request) from refused
        except asyncio.CancelledError:
            call.gone()
            raise
        return httpx.Response(
            found_head.status,
            headers=[(name, value.strip()) for name, value in found_head.fields],
            stream=answer,
        )

    async def aclose(self) -> None:
        if self._starting is not None:
            dispatcher = await self._starting
            for call in (*dispatcher.calls.values(), *dispatcher.detached):
                call.fail(502, "the transport was closed")
            for attempt in dispatcher.cluster.live():
                if attempt is attempt.call.winner:
                    attempt.call.break_off()
            await dispatcher.stop()
