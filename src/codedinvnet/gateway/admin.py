"""The gateway's own routes: metrics, probes, a page, and the policy."""

from __future__ import annotations

import json
import time
from base64 import b64encode
from collections.abc import Sequence
from hashlib import sha256
from importlib.resources import files
from typing import Any
from urllib.parse import parse_qs

from prometheus_client import generate_latest
from prometheus_client.exposition import CONTENT_TYPE_LATEST

from codedinvnet.common.errors import nearest
from codedinvnet.gateway.dispatcher import Dispatcher
from codedinvnet.gateway.history import History
from codedinvnet.gateway.metrics import RollingQuantiles, milliseconds
from codedinvnet.gateway.proof import SHARES, Report
from codedinvnet.gateway.routes import Routes
from codedinvnet.members.links import Links
from codedinvnet.net.answers import Reply
from codedinvnet.net.answers import error_reply as error
from codedinvnet.net.guard import Guard
from codedinvnet.net.http1 import RequestHead
from codedinvnet.net.logs import log_event
from codedinvnet.net.memory import Memory
from codedinvnet.net.server import HttpServer
from codedinvnet.scheduler.settings import copied_after

PREFIX = "/codedinvnet"
"""What the paths of the page, its data and the policy begin with."""
PATHS = frozenset({"/metrics", "/livez", "/readyz", PREFIX, f"{PREFIX}/status", f"{PREFIX}/policy"})
OPEN = frozenset({"/livez", "/readyz", PREFIX})
"""Those that need no token: the page shows nothing without its data."""
MOST_BODY = 4096
"""Bytes of the body of a change of the policy; requests that need no token have no body at all."""
HTML = "text/html; charset=utf-8"


class Admin:
    """Answers the gateway's own routes.

    Args:
        dispatcher: has the upstreams.
        routes: that requests came on.
        memory: what they hold.
        names: the policies that there are.
        guard: says who may change the policy.
    """

    def __init__(
        self,
        dispatcher: Dispatcher,
        routes: Routes,
        memory: Memory,
        names: Sequence[str],
        guard: Guard,
    ) -> None:
        self.dispatchers, self.routes, self.memory = [dispatcher], routes, memory
        """The first has the upstreams over HTTP, and another those over gRPC."""
        self.names, self.guard = names, guard
        self.servers: list[HttpServer] = []
        self.links: Links | None = None
        """To the gateways that this one decides with."""
        self.is_draining = False
        page = (files("codedinvnet.gateway") / "page.html").read_bytes()
        security = (b"Content-Security-Policy", b" " + content_security(page))
        self._page = Reply(200, page, HTML, [security])

    @staticmethod
    def most_body(path: str) -> int:
        """Return how many bytes the body of a request on an own route may have."""
        return 0 if path in OPEN else MOST_BODY

    def answer(self, head: RequestHead, body: Sequence[bytes]) -> Reply:
        """Return the answer to a request on one of the gateway's own routes."""
        path = head.path
        writes = path == f"{PREFIX}/policy" and head.method in (b"POST", b"PUT")
        if head.method not in (b"GET", b"HEAD") and not writes:
            return error(405, "only GET is supported here")
        if path == "/livez":
            return Reply(200, b'{"live":true}')
        if path == "/readyz":
            up = any(dispatcher.cluster.is_ready for dispatcher in self.dispatchers)
            if self.is_draining:
                return error(503, "draining")
            return Reply(200, b'{"ready":true}') if up else error(503, "no upstream is up")
        if path == "/metrics":
            self.update_gauges()
            text = generate_latest(self.dispatchers[0].metrics.registry)
            return Reply(200, text, CONTENT_TYPE_LATEST)
        if path == PREFIX:
            return self._page
        if path == f"{PREFIX}/status":
            return self._status(head)
        return self._change_policy(head, body) if writes else self._policy()

    def _policy(self) -> Reply:
        known = {"policy": self._chosen, "offered": list(self.names)}
        proof = {name: report.told() for name, report in self._reports().items()}
        more = {"refused": {}, "method": None, "proof": proof}  # the first two as of serve
        return Reply(200, json.dumps({**known, **more}).encode())

    def _reports(self) -> dict[str, Report]:
        """Return for each route whose requests may be copied what copies save and cost."""
        now = time.monotonic()
        hedged = [route for route in self.routes.all() if route.is_repeatable]
        found = {route.name: route.proof.report(now) for route in hedged}
        return {name: report for name, report in found.items() if report is not None}

    @property
    def _chosen(self) -> str:
        return self.dispatchers[0].driver.snapshot().policy

    def _change_policy(self, head: RequestHead, body: Sequence[bytes]) -> Reply:
        refusal = self.guard.refusal_of_change(head)
        if refusal is not None:
            return refusal
        try:
            asked = json.loads(b"".join(body))
        except (ValueError, RecursionError) as problem:
            return error(400, f"the body is not JSON: {problem}")
        name = asked.get("policy") if isinstance(asked, dict) else None
        if not isinstance(name, str):
            return error(400, 'the body must be an object, {"policy": NAME}')
        if name not in self.names:
            near = nearest(name, self.names)
            hint = f", did you mean {near!r}?" if near else ""
            return error(400, f"policy: {name[:100]!r} is not one of {', '.join(self.names)}{hint}")
        before = self._chosen
        for dispatcher in self.dispatchers:
            dispatcher.change_policy(name)
        log_event("policy changed", policy=name, before=before)
        return self._policy()

    def update_gauges(self) -> None:
        """Set the gauges that are read off, not counted."""
        metrics = self.dispatchers[0].metrics
        metrics.pending.set(sum(len(each.calls) for each in self.dispatchers))
        metrics.queued.set(sum(each.driver.snapshot().waiting for each in self.dispatchers))
        if self.links is not None:
            member = self.links.member
            metrics.members.set(member.size)
            metrics.members_refused.set(len(self.links.refused))
            metrics.message_seconds.set(member.message_seconds)
            metrics.alone.set(member.alone)
        metrics.memory.set(self.memory.used)
        metrics.memory_limit.set(self.memory.most)
        metrics.connections.set(sum(len(server.connections) for server in self.servers))
        for dispatcher in self.dispatchers:
            for endpoint, count in dispatcher.in_flight():
                metrics.in_flight.labels(endpoint.url).set(count)
        for name, delay in self._delays().items():
            metrics.hedge_delay.labels(name).set(delay)
        metrics.proof.clear()
        for name, report in self._reports().items():
            metrics.copies.labels(name, "attempts").set(report.attempts_share)
            metrics.copies.labels(name, "seconds").set(report.seconds_share)
            for arm, known in (("with", report.copies), ("without", report.without)):
                for quantile, share in SHARES.items():
                    for end, value in known[quantile]._asdict().items():
                        if value is not None:
                            metrics.proof.labels(name, arm, f"{share:g}", end).set(value)

    def _delays(self) -> dict[str, float]:
        """Return the seconds after which requests are copied now, by route, where known."""
        known = [each.driver.snapshot().delays for each in self.dispatchers]
        late = {route: seconds for one in known for route, seconds in one}
        hedged = [route for route in self.routes.all() if route.is_repeatable]
        found = {each.name: copied_after(late.get(each.name), each.limits.delay) for each in hedged}
        return {name: delay for name, delay in found.items() if delay is not None}

    def _status(self, head: RequestHead) -> Reply:
        """Return what the page shows, with the history of all requests or of one route's."""
        query = parse_qs(head.target.partition(b"?")[2].decode("latin-1"))
        history = self.routes.history
        if "route" in query:
            found = {route.name: route.history for route in self.routes.all()}.get(
                query["route"][0]
            )
            if found is None:
                return error(404, "no request came on this route")
            history = found
        return Reply(200, json.dumps(self.status(history)).encode())

    def status(self, history: History) -> dict[str, Any]:
        """Return what the page shows."""
        upstreams = [
            {
                "url": endpoint.url,
                "up": endpoint.is_up,
                "reason": "" if endpoint.is_up else endpoint.reason,
                "fallback": endpoint.is_fallback,
                "in_flight": count,
                "failures": endpoint.failures,
                **quantiles(endpoint.latencies),
            }
            for dispatcher in self.dispatchers
            for endpoint, count in dispatcher.in_flight()
        ]
        delays, reports = self._delays(), self._reports()
        routes = [
            {
                "name": route.name,
                "hedged": route.is_repeatable,
                "delay_ms": milliseconds(delays.get(route.name)),
                "hedges": route.hedge_counts,
                "proof": reports[route.name].told() if route.name in reports else None,
                **quantiles(route.latencies),
            }
            for route in self.routes.all()
        ]
        return {
            "policy": self._chosen,
            "pending": sum(len(each.calls) for each in self.dispatchers),
            "members": None if self.links is None else _described(self.links),
            "memory": self.memory.used,
            "time": time.time(),
            "upstreams": upstreams,
            "routes": routes,
            "errors": self.routes.history.errors(),
            "history": history.drawn(),
        }


def content_security(page: bytes) -> bytes:
    """Return the policy by which a page runs its own script and style, and asks its server only."""
    allowed = [b"default-src 'none'; connect-src 'self'; img-src data:; frame-ancestors 'none'"]
    for tag in (b"script", b"style"):
        _, _, text = page.partition(b"<%b>" % tag)
        digest = b64encode(sha256(text.partition(b"</%b>" % tag)[0]).digest())
        allowed.append(b"%b-src 'sha256-%b'" % (tag, digest))
    return b"; ".join(allowed)


def _described(links: Links) -> dict[str, Any]:
    member = links.member
    return {
        "decides": member.decides,
        "decides_for": member.size,
        "message_ms": milliseconds(member.message_seconds),
        "alone": member.alone,
        "refused": links.refused,
    }


def quantiles(times: RollingQuantiles) -> dict[str, float | None]:
    """Return three quantiles of the last minutes, in milliseconds."""
    names = ("p50_ms", "p99_ms", "p999_ms")
    return dict(zip(names, map(milliseconds, times.quantiles(0.5, 0.99, 0.999)), strict=True))
