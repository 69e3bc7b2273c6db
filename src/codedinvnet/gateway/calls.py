"""Clients' requests, and the attempts to have them answered, as the dispatcher knows them.

The dispatcher looks into neither: HTTP and gRPC have subclasses of their own.
"""

from __future__ import annotations

import logging
import re
import time
from abc import ABC, abstractmethod
from enum import Enum, StrEnum
from typing import TYPE_CHECKING, Any, NamedTuple

from codedinvnet.gateway.access import AccessLog, Entry
from codedinvnet.gateway.proof import Arm
from codedinvnet.net.logs import Quiet

if TYPE_CHECKING:
    from codedinvnet.gateway.cluster import Endpoint
    from codedinvnet.gateway.routes import Route
    from codedinvnet.gateway.tracing import AttemptTrace, RequestTrace
    from codedinvnet.net.http1 import RequestHead
    from codedinvnet.net.memory import Memory
    from codedinvnet.scheduler.caches import Prompt

TRACEPARENT = re.compile(rb"[0-9a-f]{2}-(?!0{32})([0-9a-f]{32})-[0-9a-f]{16}-")
SLOW = 1.0
"""Seconds after which a request is logged with its attempts."""
OUTCOMES = {504: "deadline", 429: "refused"}
"""How a request ends that gets one of these; with others it has failed."""
_slow, _failed = Quiet(), Quiet()


class Cause(Enum):
    """Why an attempt failed."""

    UNSENT = "refused"
    """No connection: not a byte was written."""
    NO_FILES = "no_files"
    """This process may open no more files; no upstream is to blame."""
    BROKEN = "broken"
    """The connection broke after the request was written."""
    STATUS = "status"
    """The upstream answered with a status that tells of a failure of its own."""
    SILENT = "silent"
    """No answer in time."""
    LOST = "lost"
    """The upstream was ejected or removed, and what it had in hand was given up."""


class Failure(NamedTuple):
    """How an attempt failed."""

    cause: Cause
    reason: str
    """In words."""
    reply: Any = None
    """The upstream's answer, which the client gets if no other answers; None without one."""
    retry_after: float = 0.0
    """Seconds after which the upstream wants to be asked again; 0 if it didn't say."""


class State(StrEnum):
    """Where an attempt is in its life."""

    CONNECT = "connect"
    """The upstream has nothing of the request, or closed the connection before it read it."""
    HOLD = "hold"
    """The request is written. What comes is kept until the answer is complete."""
    SEEK = "seek"
    """What comes is kept until the first content is here."""
    FOUND = "found"
    """The first content is here, or more; it is kept until the client takes it."""
    WHOLE = "whole"
    """So is all of the answer."""
    STREAM = "stream"
    """What comes is passed on."""
    LEFT = "left"
    """Nobody needs the answer: it ends by itself."""
    COMPLETE = "complete"
    FAILED = "failed"
    CANCELLED = "cancelled"

    def to(self, state: State) -> State:
        """Return the next state.

        Raises:
            RuntimeError: if this one is not followed by that.
        """
        if state not in NEXT[self]:
            raise RuntimeError(f"an attempt cannot go from {self} to {state}")
        return state


ENDS = (State.COMPLETE, State.FAILED, State.CANCELLED)
BREAKS = (State.FAILED, State.CANCELLED)
NEXT = {
    State.CONNECT: (State.HOLD, *BREAKS),
    State.HOLD: (State.CONNECT, State.SEEK, State.FOUND, State.WHOLE, State.LEFT, *ENDS),
    State.SEEK: (State.FOUND, State.WHOLE, State.LEFT, *BREAKS),
    State.FOUND: (State.WHOLE, State.STREAM, State.LEFT, *BREAKS),
    **dict.fromkeys((State.WHOLE, State.STREAM, State.LEFT), ENDS),
    **dict.fromkeys(ENDS, ()),
}
"""What each state may be followed by."""


class Call(ABC):
    """A client's request.

    Args:
        route: its key of learning, and whether it may be copied.
        repeatable: whether this request may be sent to more than one upstream.
        size_class: requests of one size class take about as long.
        deadline: until when its client waits for the first content (`time.monotonic()`).
        memory: counts what it holds.

    Attributes:
        query: the scheduler's number; 0 before.
        attempts: all that were made.
        written: whether an upstream was sent a byte of it.
        breaks: connections that broke over it.
        last: how the last attempt failed; None if none has.
        winner: the attempt that answers it.
        is_over: whether the client has an answer, an error, or is gone.
        prompt: what upstreams may have cached of it; None: nothing is known of that.
        priority: which calls wait for it, and for which it waits.
        size: bytes that it holds until it is over and all attempts have ended.
        http_head: of the request, if it is over HTTP.
        outcome: how it ended; "" before.
        status: that its client got; 0: none.
        passed_on: bytes of its answer's body that the client was sent.
        access: where it is logged; None: nowhere.
        trace: its span; None: it is not traced.
        arm: whether it was copied, or held out, because it was late.
    """

    def __init__(
        self, route: Route, repeatable: bool, size_class: int, deadline: float, memory: Memory
    ) -> None:
        self.route, self.repeatable, self.size_class = route, repeatable, size_class
        self.came, self.deadline, self.memory = time.monotonic(), deadline, memory
        self.query = self.breaks = self.size = 0
        self.priority = route.limits.priority
        self.prompt: Prompt | None = None
        self.identity = self.address = b""
        self.outcome, self.status, self.passed_on = "", 0, 0
        self.arm = Arm.NEITHER
        self.written = self.is_over = False
        self.attempts: list[Attempt] = []
        self.last: Failure | None = None
        self.winner: Attempt | None = None

    access: AccessLog | None = None
    http_head: RequestHead | None = None
    trace: RequestTrace | None = None

    @property
    def waits(self) -> bool:
        """Whether its client has nothing of an answer, and is not gone."""
        return not self.is_over and self.winner is None

    @property
    def live(self) -> int:
        """How many attempts have not ended."""
        return sum(not attempt.is_over for attempt in self.attempts)

    @property
    def trace_id(self) -> str:
        """Of the trace that it is part of, its client's too; "" without one."""
        if self.trace is not None:
            return self.trace.id
        said = b"" if self.http_head is None else self.http_head.known.get(b"traceparent", b"")
        found = TRACEPARENT.match(said)
        return "" if found is None else found[1].decode()

    @abstractmethod
    def attempt(self, endpoint: Endpoint, number: int) -> Attempt:
        """Return an attempt at an endpoint, not yet started."""

    @abstractmethod
    def fail(self, status: int, reason: str, retry_after: int = 0) -> None:
        """Answer with an error, or with the upstream's own if `last` has one.

        Args:
            status: of HTTP.
            reason: in words.
            retry_after: seconds after which the client may try again; 0 if unknown.
        """

    @abstractmethod
    def break_off(self) -> None:
        """End an answer visibly whose rest will not come."""

    @abstractmethod
    def method_and_path(self) -> tuple[str, str]:
        """Return its method and path, for the log."""

    def note(self, outcome: str, status: int) -> None:
        """Say how it ends and with which status (0: none), and log it if it was slow."""
        self.outcome, self.status = outcome, status
        if outcome != "failed" and time.monotonic() - self.came > SLOW:
            self.log("slow request")

    def log(self, event: str, **more: object) -> None:
        """Log it with its attempts, if nothing alike was logged just now."""
        method, path = self.method_and_path()
        quiet = _slow if event == "slow request" else _failed
        attempts = [attempt.described() for attempt in self.attempts]
        ms = round(1000 * (time.monotonic() - self.came), 1)
        fields = {"method": method, "path": path, "ms": ms, **more, "attempts": attempts}
        if self.identity:
            fields["request_id"] = self.identity.decode()
        if trace := self.trace_id:
            fields["trace_id"] = trace
        quiet.log(event, logging.WARNING, **fields)

    def end(self) -> None:
        """Count how it ended: its client waits no longer."""
        if not self.is_over and self.outcome:
            self.route.count(self.outcome, self.status)
            if not self.attempts and self.outcome != "refused":
                self.route.queued(time.monotonic() - self.came)
        if self.access is not None and not self.is_over:
            self.access.add(self._entry(), self.http_head)
        if self.trace is not None and not self.is_over:
            self.trace.end(self.outcome, self.status)
        self.is_over = True
        self.release()

    def _entry(self) -> Entry:
        """Return what the access log says of it."""
        method, target = self.method_and_path()
        entry = Entry(method, target, self.status, self.address.decode("ascii", "replace"))
        entry.seconds, entry.size = time.monotonic() - self.came, self.passed_on
        entry.route, entry.outcome = self.route.name, self.outcome
        entry.identity, entry.attempts = self.identity.decode(), len(self.attempts)
        entry.trace = self.trace_id
        last = self.winner or (self.attempts[-1] if self.attempts else None)
        entry.upstream = "" if last is None else last.endpoint.url
        return entry

    def release(self) -> None:
        """Let its memory go if neither the client nor an attempt needs it."""
        if self.is_over and not self.live:
            self.memory.give(self.size)
            self.size, self.winner = 0, None
            self.attempts.clear()  # they know the call: collecting such a ring takes a while


class Attempt(ABC):
    """One sending of a call to an upstream.

    Args:
        call: what is sent.
        endpoint: the upstream.
        number: the scheduler's.

    Attributes:
        began: when it was started.
        state: changed by `become` only.
        is_copy: whether it was sent because the request was late.
        is_blamed: whether its silence was counted as a failure of its endpoint.
        result: how it ended, for metrics and the log; of a stream how it began, until then.
        status: of the answer; 0 before.
        trace: its span; None: it is not traced, or has ended.
    """

    trace: AttemptTrace | None = None

    def __init__(self, call: Call, endpoint: Endpoint, number: int) -> None:
        self.call, self.endpoint, self.number = call, endpoint, number
        self.began = self.heard = time.monotonic()
        self.state, self.is_copy, self.is_blamed = State.CONNECT, False, False
        self.result, self.status, self.seconds = "", 0, 0.0

    @property
    def is_over(self) -> bool:
        """Whether nothing more will come of it."""
        return self.state in ENDS

    @property
    def is_stream(self) -> bool:
        """Whether the answer is known to be a stream."""
        return self.state in (State.SEEK, State.FOUND, State.STREAM)

    def become(self, state: State) -> None:
        """Enter a state.

        Raises:
            RuntimeError: if the present one is not followed by it.
        """
        self.state = self.state.to(state)
        if state is State.LEFT or state in ENDS:
            self.let_go()

    @property
    @abstractmethod
    def fault(self) -> Failure | None:
        """The upstream's failure, if its answer tells of one but is passed on."""

    @abstractmethod
    def start(self) -> None:
        """Send the request."""

    @abstractmethod
    def pass_on(self) -> None:
        """Send the client what is here of the answer, which has won, and the rest as it comes."""

    @abstractmethod
    def let_go(self) -> None:
        """Keep nothing more, and if it is over, have nothing more come. `become` calls this."""

    def end_trace(self, result: str, reason: str = "") -> None:
        """End its span by how it ended, and why it failed in words."""
        if self.trace is not None:
            won = self.call.winner is self
            self.trace.end(result, self.status, won, reason or result)
            self.trace = None

    def described(self) -> dict[str, Any]:
        """Return the fields of it that are logged."""
        now = "answered" if self.call.winner is self else "waiting"
        fields: dict[str, Any] = {"upstream": self.endpoint.url, "result": self.result or now}
        if self.status:
            fields["status"] = self.status
        fields["after_ms"] = round(1000 * (self.began - self.call.came), 1)
        fields["ms"] = round(1000 * (self.seconds or time.monotonic() - self.began), 1)
        return fields
