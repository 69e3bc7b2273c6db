"""Clients' requests over HTTP: what upstreams are sent, and what clients get."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

from codedinvnet.gateway import deadlines
from codedinvnet.gateway.attempts import HttpAttempt, tells_of_failure
from codedinvnet.gateway.calls import OUTCOMES, Call
from codedinvnet.gateway.cluster import Endpoint
from codedinvnet.gateway.content import error_event
from codedinvnet.gateway.forwarded import FIELDS, Forwarding, request_id
from codedinvnet.gateway.priority import FIELD, granted, name_of
from codedinvnet.gateway.routes import Route
from codedinvnet.gateway.tracing import METHOD, METHODS, RequestTrace
from codedinvnet.net.http1 import HOP_BY_HOP, Fields, RequestHead, ResponseHead, write_fields
from codedinvnet.net.memory import Memory
from codedinvnet.scheduler.group import size_class

if TYPE_CHECKING:
    from codedinvnet.gateway.dispatcher import Dispatcher
    from codedinvnet.gateway.tokens import UpstreamToken
    from codedinvnet.net.tracing import Tracer

PRIORITY = FIELD.encode()
OUTCOME = b"codedinvnet-outcome"
"""The field that marks answers of the fallback, and errors of the last upstream."""
NOT_PASSED_ON = HOP_BY_HOP | {b"host", b"content-length", b"expect", b"x-hedge", PRIORITY}
OF_GATEWAY = NOT_PASSED_ON | FIELDS
"""What upstreams are told by the gateway, whatever clients said."""
EVENT_ENDS = (b"\n\n", b"\r\n\r\n", b"\r\r")
AUTHORIZATION = frozenset({b"authorization"})


class Client(Protocol):
    """Gets the answer to a call."""

    memory: Memory

    def respond(
        self,
        head: ResponseHead,
        added: Fields,
        body: Sequence[bytes],
        trailers: Fields,
        is_complete: bool,
    ) -> None:
        """Take an answer's beginning, or all of it; otherwise its other parts follow."""

    def send_body(self, data: bytes) -> None:
        """Take the next part of the body."""

    def end_body(self, trailers: Fields) -> None:
        """Called when the body is complete."""

    def abort(self, last: bytes = b"") -> None:
        """Called when the rest will not come, except for a last part of a stream."""

    def refuse(self, status: int, reason: str, retry_after: int = 0) -> None:
        """Take an error of the gateway's own."""


class HttpCall(Call):
    """A request over HTTP, in parts, and its client, which gets the answer.

    With a token, upstreams get that in place of the client's authorization; with a forwarding,
    they are told who the client is, and each request has a number.
    """

    def __init__(
        self,
        client: Client,
        head: RequestHead,
        body: Sequence[bytes],
        trailers: Fields,
        route: Route,
        repeatable: bool,
        dispatcher: Dispatcher,
        token: UpstreamToken | None = None,
        forwarding: Forwarding | None = None,
    ) -> None:
        length = sum(map(len, body))
        self.deadlines = deadlines.stated(head)
        seconds = route.limits.deadline
        if self.deadlines:
            seconds = min(seconds, *self.deadlines.values())
        deadline = time.monotonic() + seconds
        super().__init__(route, repeatable, size_class(length), deadline, client.memory)
        self.client, self.head, self.body, self.trailers = client, head, body, trailers
        self.dispatcher, self.token, self.http_head = dispatcher, token, head
        dropped, own = NOT_PASSED_ON, b""
        if forwarding is not None:
            dropped = OF_GATEWAY
            self.identity = request_id(head)
            self.address = forwarding.client(head)
            own = forwarding.write(head, self.identity)
        if (said := head.known.get(PRIORITY)) is not None:
            is_trusted = forwarding is None or forwarding.hops > 0
            self.priority = granted(said.decode("latin-1"), self.priority, is_trusted)
            own += b"X-Priority: %b\r\n" % name_of(self.priority).encode()
        if token is not None:
            dropped = dropped | AUTHORIZATION
        if self.deadlines:
            dropped = dropped.union(self.deadlines)
        if dispatcher.tracer is not None:
            self.trace = self._traced(dispatcher.tracer)
            dropped = dropped.union(name.encode() for name in dispatcher.tracer.fields)
        fields = own + head.written(dropped)
        if trailers:
            fields += b"Transfer-Encoding: chunked\r\n\r\n"
            chunk = b"%x\r\n%b\r\n" % (length, b"".join(body)) if length else b""
            self.body = [chunk, b"0\r\n", write_fields(trailers), b"\r\n"]
        elif length or head.length is not None or head.chunked:
            fields += b"Content-Length: %d\r\n\r\n" % length
        else:
            fields += b"\r\n"
        self._rest = fields
        self._sent = b""
        """The last part of a stream that was passed on."""

    def _traced(self, tracer: Tracer) -> RequestTrace:
        """Begin its span."""
        head, said = self.head, self.head.method.decode("latin-1")
        method = said if said in METHODS else "_OTHER"
        fields = {name.decode(): value.decode("latin-1") for name, value in head.known.items()}
        path = head.target.partition(b"?")[0].decode("latin-1")
        own = {"url.path": path, "client.address": self.address.decode("ascii", "replace")}
        template = self.route.name.partition(" ")[2]
        if template.startswith("/"):
            own["http.route"] = template
        name = f"{'HTTP' if method == '_OTHER' else method} {own.get('http.route', '')}".strip()
        return RequestTrace(tracer, name, fields, {METHOD: method}, own, path)

    def attempt(self, endpoint: Endpoint, number: int) -> HttpAttempt:
        return HttpAttempt(self, endpoint, number)

    def request(self, attempt: HttpAttempt) -> list[bytes]:
        """Return the request as an attempt's upstream gets it, in parts."""
        head, client = self.head, attempt.endpoint.client
        start = b"%b %b%b HTTP/1.1\r\nHost: %b\r\n" % (
            head.method,
            client.path,
            head.target,
            client.authority,
        )
        own = b"" if self.token is None else self.token.field
        if self.deadlines:
            own += deadlines.written(self.deadlines, time.monotonic() - self.came)
        if attempt.trace is not None:
            pairs = attempt.trace.fields.items()
            own += write_fields((name.encode(), b" " + value.encode()) for name, value in pairs)
        return [start + own + self._rest, *self.body]

    def blames(self, status: int) -> bool:
        """Return whether a status tells of a failure of the upstream that another may make up for.

        A client whose request must not be repeated gets whatever its upstream says.
        """
        if not self.repeatable:
            return False
        if tells_of_failure(status):
            return True
        shown = self.token is not None and bool(self.token.field)
        if status in (401, 403):
            return shown
        reads = self.head.method in (b"GET", b"HEAD")
        return not reads and (300 <= status < 400 or status == 404)

    # Answers

    def begin(
        self, head: ResponseHead, body: Sequence[bytes], trailers: Fields, is_complete: bool
    ) -> None:
        """Send the client the beginning of an answer, or all of it."""
        winner = self.winner
        assert winner is not None
        if not is_complete and body:
            self._sent = body[-1]
        self.passed_on = sum(map(len, body))
        outcome = "fallback" if winner.endpoint.is_fallback else "direct"
        is_marked = outcome != "direct" and OUTCOME not in head.known
        added = [(OUTCOME, b" fallback")] if is_marked else []
        self.client.respond(head, added, body, trailers, is_complete)
        self.note(outcome, head.status)
        if is_complete:
            self.end()

    def send(self, data: bytes) -> None:
        """Send the client the next part of a stream."""
        self._sent = data
        self.passed_on += len(data)
        self.client.send_body(data)

    def finish(self, trailers: Fields) -> None:
        """The stream is complete."""
        self.client.end_body(trailers)
        self.end()

    def break_off(self) -> None:
        """The upstream failed in mid-stream: end the client's stream visibly."""
        self.outcome = "aborted"
        self.log("stream broke off")
        winner, last = self.winner, b""
        if isinstance(winner, HttpAttempt) and self._sent.endswith(EVENT_ENDS):
            last = error_event(winner.api)
        self.end()
        self.client.abort(last)

    def fail(self, status: int, reason: str, retry_after: int = 0) -> None:
        last = self.last.reply if self.last is not None and status == 502 else None
        outcome = OUTCOMES.get(status, "failed")
        if last is not None:
            status, self.passed_on = last[0].status, len(last[1])
        self.note(outcome, status)
        self.log("request failed", reason=reason)
        self.end()
        if last is None:
            self.client.refuse(status, reason, retry_after)
            return
        head, body, trailers = last
        added = [] if OUTCOME in head.known else [(OUTCOME, b" failed")]
        self.client.respond(head, added, [body], trailers, True)

    def pause(self) -> None:
        """The client is slow: read no more of the answer for now."""
        if isinstance(self.winner, HttpAttempt):
            self.winner.pause()

    def resume(self) -> None:
        """Read on."""
        if isinstance(self.winner, HttpAttempt):
            self.winner.resume()

    def gone(self) -> None:
        """The client hung up."""
        if not self.is_over:
            self.note("cancelled", 0)
            self.dispatcher.cancel(self)

    def method_and_path(self) -> tuple[str, str]:
        return self.head.method.decode("latin-1"), self.head.target[:200].decode("latin-1")
