"""The gateway's own routes: metrics, probes, a page, and the policy."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from importlib.resources import files
from typing import Any

from prometheus_client import generate_latest
from prometheus_client.exposition import CONTENT_TYPE_LATEST

from codedinvnet.errors import nearest
from codedinvnet.gateway.answers import Reply
from codedinvnet.gateway.dispatcher import Dispatcher
from codedinvnet.gateway.memory import Memory
from codedinvnet.gateway.metrics import RollingQuantiles
from codedinvnet.gateway.routes import Route, Routes
from codedinvnet.gateway.server import GatewayServer
from codedinvnet.net.http1 import RequestHead
from codedinvnet.net.logs import log_event
from codedinvnet.scheduler.policies import POLICIES

PREFIX = "/codedinvnet"
"""What the paths of the page, its data and the policy begin with."""
PATHS = frozenset({"/metrics", "/livez", "/readyz", PREFIX, f"{PREFIX}/status", f"{PREFIX}/policy"})
OPEN = frozenset({"/livez", "/readyz", PREFIX})
"""Those that need no token: the page shows nothing without its data."""
HTML = "text/html; charset=utf-8"


class Admin:
    """Answers the gateway's own routes.

    Args:
        dispatcher: has the upstreams.
        routes: that requests came on.
        memory: what they hold.
        names: the policies that there are.
        is_guarded: whether only this machine's users reach the port, or a token is needed.
    """

    def __init__(
        self,
        dispatcher: Dispatcher,
        routes: Routes,
        memory: Memory,
        names: Sequence[str],
        is_guarded: bool,
    ) -> None:
        self.dispatcher, self.routes, self.memory = dispatcher, routes, memory
        self.names, self.is_guarded = names, is_guarded
        self.servers: list[GatewayServer] = []
        self.others: list[Dispatcher] = []
        """Of upstreams over gRPC."""
        self.is_draining = False
        self._page = (files("codedinvnet.gateway") / "page.html").read_bytes()

    def answer(self, head: RequestHead, body: Sequence[bytes]) -> Reply:
        """Return the answer to a request on one of the gateway's own routes."""
        path = head.target.partition(b"?")[0].decode("latin-1")
        writes = path == f"{PREFIX}/policy" and head.method in (b"POST", b"PUT")
        if head.method not in (b"GET", b"HEAD") and not writes:
            return error(405, "only GET is supported here")
        if path == "/livez":
            return Reply(200, b'{"live":true}')
        if path == "/readyz":
            clusters = [self.dispatcher.cluster, *(other.cluster for other in self.others)]
            ready = any(cluster.is_ready for cluster in clusters) and not self.is_draining
            return Reply(200, b'{"ready":true}') if ready else error(503, "no upstream is up")
        if path == "/metrics":
            self.update_gauges()
            text = generate_latest(self.dispatcher.metrics.registry)
            return Reply(200, text, CONTENT_TYPE_LATEST)
        if path == PREFIX:
            return Reply(200, self._page, HTML)
        if path == f"{PREFIX}/status":
            return Reply(200, json.dumps(self.status()).encode())
        return self._change_policy(head, body) if writes else self._policy()

    def _policy(self) -> Reply:
        chosen = self.dispatcher.scheduler.chosen.name
        names = list(self.names)  # the keys are those of `serve`
        reply = json.dumps({"policy": chosen, "offered": names, "refused": {}, "method": None})
        return Reply(200, reply.encode())

    def _change_policy(self, head: RequestHead, body: Sequence[bytes]) -> Reply:
        if not self.is_guarded:
            return error(403, "whoever reaches the port could do this: it needs --token-file")
        kind = head.known.get(b"content-type", b"").partition(b";")[0].strip()
        if kind != b"application/json":  # pages of other sites can only send other types
            return error(415, "the content type must be application/json")
        try:
            asked = json.loads(b"".join(body)[:4096])
        except (ValueError, RecursionError) as problem:
            return error(400, f"the body is not JSON: {problem}")
        name = asked.get("policy") if isinstance(asked, dict) else None
        if not isinstance(name, str):
            return error(400, 'the body must be an object, {"policy": NAME}')
        if name not in self.names:
            near = nearest(name, self.names)
            hint = f", did you mean {near!r}?" if near else ""
            return error(400, f"policy: {name[:100]!r} is not one of {', '.join(self.names)}{hint}")
        before = self.dispatcher.scheduler.chosen.name
        scheduler = self.dispatcher.scheduler
        self.dispatcher.do(scheduler.change_policy(time.monotonic(), POLICIES[name]))
        log_event("policy changed", policy=name, before=before)
        return self._policy()

    def update_gauges(self) -> None:
        """Set the gauges that are read off, not counted."""
        dispatcher, metrics = self.dispatcher, self.dispatcher.metrics
        metrics.pending.set(len(dispatcher.calls))
        metrics.queued.set(dispatcher.scheduler.waiting)
        metrics.memory.set(self.memory.used)
        metrics.memory_limit.set(self.memory.most)
        metrics.connections.set(sum(len(server.connections) for server in self.servers))
        for endpoint in dispatcher.cluster:
            metrics.in_flight.labels(endpoint.url).set(len(endpoint.live))
        self._count_refused()
        for route in self.routes.all():
            delay = delay_of(dispatcher, route)
            if delay is not None:
                metrics.hedge_delay.labels(route.name).set(delay)

    def _count_refused(self) -> None:
        """Take in how many copies the scheduler's budget has refused since the last look."""
        for route in self.routes.all():
            counts = self.dispatcher.scheduler.dispatcher.copies.get(route.name)
            more = 0 if counts is None else counts.refused - route.hedge_counts["refused"]
            if more > 0:
                route.hedged("refused", more)

    def status(self) -> dict[str, Any]:
        """Return what the page shows."""
        self._count_refused()
        dispatcher = self.dispatcher
        upstreams = [
            {
                "url": endpoint.url,
                "up": endpoint.is_up,
                "reason": "" if endpoint.is_up else endpoint.reason,
                "fallback": endpoint.worker >= dispatcher.cluster.mains,
                "in_flight": len(endpoint.live),
                "failures": endpoint.failures,
                **quantiles(endpoint.latencies),
            }
            for endpoint in dispatcher.cluster
        ]
        routes = [
            {
                "name": route.name,
                "hedged": route.is_repeatable,
                "delay_ms": milliseconds(delay_of(dispatcher, route)),
                "hedges": route.hedge_counts,
                **quantiles(route.latencies),
            }
            for route in self.routes.all()
        ]
        return {
            "policy": dispatcher.scheduler.chosen.name,
            "pending": len(dispatcher.calls),
            "memory": self.memory.used,
            "time": time.time(),
            "upstreams": upstreams,
            "routes": routes,
        }


def delay_of(dispatcher: Dispatcher, route: Route) -> float | None:
    """Return the seconds after which a route's requests are copied now; None: nobody knows.

    It is that of the size class that most of them have.
    """
    if not route.is_repeatable or not route.sizes:
        return None
    usual = max(route.sizes, key=route.sizes.__getitem__)
    return dispatcher.scheduler.dispatcher.hedge_delay(route.name, usual)


def quantiles(times: RollingQuantiles) -> dict[str, float | None]:
    """Return three quantiles of the last minutes, in milliseconds."""
    names = ("p50_ms", "p99_ms", "p999_ms")
    return dict(zip(names, map(milliseconds, times.quantiles(0.5, 0.99, 0.999)), strict=True))


def milliseconds(seconds: float | None) -> float | None:
    """Return milliseconds, rounded as is fit to show."""
    return None if seconds is None else round(1000 * seconds, 2)


def error(status: int, reason: str) -> Reply:
    """Return an error of a route of our own."""
    return Reply(status, json.dumps({"error": reason}).encode())
