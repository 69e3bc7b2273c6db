"""One request to one upstream over HTTP, until its answer is known, passed on, or not needed.

An answer with a length is held until it is complete, so that an upstream that breaks off can be
made up for. A stream, and what is long, is held until its first content. Errors of an upstream are
read to their end, since some say that its further answers cannot be trusted.
"""

from __future__ import annotations

import asyncio
import errno
import time
from typing import TYPE_CHECKING

from codedinvnet.gateway.calls import Attempt, Cause, Failure, State
from codedinvnet.gateway.cluster import Endpoint
from codedinvnet.gateway.content import FirstContent
from codedinvnet.net.client import LONGEST_IDLE, Broken, Connection, described
from codedinvnet.net.http1 import Fields, ResponseHead

if TYPE_CHECKING:
    from codedinvnet.gateway.proxy import HttpCall

MOST_HELD = 1 << 20
"""Bytes of an answer that are held; longer ones are passed on from their first byte."""
MOST_ERROR = 1 << 16
"""Bytes that are read of an error that is not passed on."""
FRESH = 1.0
"""Seconds that a connection may have been idle for a request that must not be repeated: the server
may close an older one as the request arrives."""
UNSURE, HOLD = 0.9, 0.02
"""A V2 answer that took longer is held for so many seconds, as its upstream may be a Triton that is
about to be found out, and its connection is not kept."""
SIGNS = (b"Stub process", b"health mutex")
"""What Triton says when a process of its Python backend stood still. That process goes on with what
it was asked before, and the next request gets the answer."""
STREAM = b"text/event-stream"


class HttpAttempt(Attempt):
    """Sends a call to an endpoint, and receives the answer.

    Attributes:
        head: of the answer; None before.
        body: what is held of it.
        trailers: behind it.
    """

    call: HttpCall

    def __init__(self, call: HttpCall, endpoint: Endpoint, number: int) -> None:
        super().__init__(call, endpoint, number)
        self._connection: Connection | None = None
        self._task: asyncio.Task[None] | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._finder: FirstContent | None = None
        self.head: ResponseHead | None = None
        self.body: list[bytes] = []
        self.size = 0
        self.trailers: Fields = []

    @property
    def api(self) -> str:
        """Whose events a stream has; "" if unknown."""
        return "" if self._finder is None else self._finder.api

    @property
    def _has_failed(self) -> bool:
        """Whether a stream begins with an error."""
        return self._finder is not None and self._finder.is_error

    @property
    def fault(self) -> Failure | None:
        if not tells_of_failure(self.status) and not self._has_failed:
            return None
        what = "a stream that is an error" if self._has_failed else f"status {self.status}"
        reason = f"{self.endpoint.url}: {what}"
        return Failure(Cause.STATUS, reason, retry_after=seconds_until_retry(self.head))

    # To the upstream

    def start(self) -> None:
        client, connection = self.endpoint.client, None
        if not self.call.breaks:  # a kept one might be closed, and break as well
            connection = client.kept(LONGEST_IDLE if self.call.repeatable else FRESH)
        if connection is not None:
            self._write(connection)
        else:
            self._task = client.loop.create_task(self._connect())

    async def _connect(self) -> None:
        try:
            connection = await self.endpoint.client.connect()
        except OSError as error:
            files = error.errno in (errno.EMFILE, errno.ENFILE)
            cause = Cause.NO_FILES if files else Cause.UNSENT
            self._failed(cause, described(error))
            return
        if self.call.written and not self.call.repeatable:
            connection.abort()
            self._failed(Cause.LOST, "another upstream has it")
        else:
            self._write(connection)

    def _write(self, connection: Connection) -> None:
        call = self.call
        self.become(State.HOLD)
        try:
            connection.send(self, call.head.method, call.request(self))
        except ConnectionError as error:
            self._failed(Cause.UNSENT, str(error))
            return
        self._connection, call.written = connection, True

    def _failed(self, cause: Cause, reason: str, reply: object = None) -> None:
        again = seconds_until_retry(self.head) if cause is Cause.STATUS else 0.0
        failure = Failure(cause, f"{self.endpoint.url}: {reason}", reply, again)
        self.call.dispatcher.failed(self, failure)

    # From the upstream

    def on_head(self, head: ResponseHead) -> None:
        self.head, self.status = head, head.status
        if head.status >= 600:
            self._failed(Cause.BROKEN, f"its status is {head.status}")
        elif self.state is State.LEFT or self.call.blames(head.status):
            return
        elif head.known.get(b"content-type", b"").lower().startswith(STREAM) and head.status < 300:
            self._finder = FirstContent()
            self.become(State.SEEK)
        elif head.has_body(self.call.head.method) and (
            head.length is None or head.length > MOST_HELD or self.call.memory.is_full
        ):
            self.become(State.SEEK)

    def on_body(self, data: bytes) -> None:
        state = self.state
        if state is State.STREAM:
            self.heard = time.monotonic()
            self.call.send(data)
            return
        if state is State.LEFT and (self.status < 400 or self.size >= MOST_ERROR):
            return
        self.body.append(data)
        self.size += len(data)
        self.call.memory.take(len(data))
        full = state is State.HOLD and self.call.memory.is_full
        if state is State.SEEK or (full and not self.call.blames(self.status)):
            if self._finder is None or self._finder.feed(data):
                if self._has_failed and self.call.repeatable:  # another upstream may do better
                    said = b"".join(self.body)
                    reason = f"it said: {said[:200].decode('latin-1')}"
                    self._failed(Cause.STATUS, reason, (self.head, said, self.trailers))
                else:
                    self.become(State.FOUND)
                    self._found()
        elif self.size > MOST_HELD and state is State.FOUND:
            self.pause()  # its client may not have it yet
        elif self.size > MOST_HELD:  # an error without a length
            self._failed(Cause.BROKEN, f"status {self.status} with more than {MOST_HELD} bytes")

    def on_end(self, trailers: Fields) -> None:
        self.trailers, self._connection = trailers, None
        dispatcher, is_error = self.call.dispatcher, self.status >= 400
        body = b"".join(self.body) if is_error else b""
        said = body[:200].decode("latin-1")
        if is_error and self.call.route.is_v2 and any(sign in body for sign in SIGNS):
            self.endpoint.distrust(f"it said: {said}")
            if self.is_over:
                return
        if self.state is State.STREAM:
            dispatcher.end(self, State.COMPLETE, self.result)
            self.call.finish(trailers)
        elif self.state is State.FOUND:
            self.become(State.WHOLE)  # `_found` goes on
        elif self.call.blames(self.status):
            reply = (self.head, body, trailers)
            self._failed(Cause.STATUS, f"status {self.status}: {said}".rstrip(": "), reply)
        elif self.state is State.LEFT:
            dispatcher.answered(self, not is_error)
        else:
            self.become(State.WHOLE)
            self._found()

    def on_lost(self, error: Exception) -> None:
        self._connection = None
        if self.state is State.STREAM:
            self._failed(Cause.BROKEN, f"in mid-stream: {described(error)}")
            self.call.break_off()
        elif isinstance(error, Broken) and error.stale and self._may_send_again():
            self.call.breaks += 1
            self.become(State.CONNECT)
            self._task = self.endpoint.client.loop.create_task(self._connect())
        else:
            self._failed(Cause.BROKEN, described(error))

    def _may_send_again(self) -> bool:
        """Return whether the same upstream gets the request on a new connection.

        Servers close idle connections at any time, but one that the request kills looks the same:
        the request goes to another upstream where there is one.
        """
        call, cluster = self.call, self.call.dispatcher.cluster
        alone = call.live == 1 and not cluster.has_others(self.endpoint)
        return alone and call.waits and call.repeatable and not call.breaks

    # The answer

    def _found(self, is_sure: bool = False) -> None:
        """The answer is here, or its first content."""
        loop = self.endpoint.client.loop
        if not is_sure and self.call.route.is_v2 and loop.time() - self.began > UNSURE:
            if self._connection is not None:
                self._connection.sound = False  # a second answer may follow
            self.endpoint.client.close_idle()
            self._timer = loop.call_later(HOLD, self._found, True)
            return
        self.call.dispatcher.answered(self, self.status < 400 and not self._has_failed)

    def pass_on(self) -> None:
        assert self.head is not None
        body, self.body = self.body, []
        self.call.memory.give(self.size)
        self.size = 0
        is_complete = self.state is State.WHOLE
        if not is_complete:
            self.become(State.STREAM)
            self.heard = time.monotonic()
            self.resume()  # what was held may have been long
        self.call.begin(self.head, body, self.trailers, is_complete)

    def pause(self) -> None:
        """Read no more until the client has taken what it has."""
        if self._connection is not None:
            self._connection.pause()

    def resume(self) -> None:
        """Read on."""
        if self._connection is not None:
            self._connection.resume()

    def let_go(self) -> None:
        self.call.memory.give(self.size)
        self.size, self.body = 0, []
        if self._timer is not None:
            self._timer.cancel()
        if not self.is_over:
            self.resume()
            return
        if self._task is not None:
            self._task.cancel()
        if self._connection is not None:
            self._connection.abort()
            self._connection = None


def tells_of_failure(status: int) -> bool:
    """Return whether a status tells of a failure of the server, whatever was asked."""
    return (status >= 500 and status != 501) or status in (408, 429)


def seconds_until_retry(head: ResponseHead | None) -> float:
    """Return what an answer's `Retry-After` says in seconds; 0 without one, or if it is a date."""
    text = b"" if head is None else head.known.get(b"retry-after", b"")
    return float(text) if text.isdigit() and len(text) < 7 else 0.0
