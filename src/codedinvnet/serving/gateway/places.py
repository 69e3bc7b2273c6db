"""What a pool of upstreams remembers of each, and how many calls may be sent to a second one."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Collection
from dataclasses import dataclass

from codedinvnet.serving.gateway.upstreams import Nobody, Upstream

MOST_FAILURES = 3
"""Failed calls in a row, after which an upstream is set aside, unless all upstreams fail."""
RETRY_SHARE, MOST_RETRIES = 0.1, 50.0
"""Calls that upstreams failed may be sent to others: a share of all calls, saved up at most."""


@dataclass
class Place:
    """An upstream and what is known of it.

    Attributes:
        upstream: the server.
        worker: its number in the pool.
        up: whether calls are sent to it.
        on_probation: whether it has answered no call since it was set aside.
        failures: calls in a row that it failed, those before it was set aside among them.
        answered: when it last said that it is ready, or answered a call as a sound one does.
        vouched: when it last said that it has the model, though it had answered that it has none.
        heard: when it last answered a call.
        newest: when the newest call was sent that it has answered.
        silent: probes in a row that it did not answer.
        agrees: whether it said last that it has the model that others have.
        differs: whether its model is another one than the small backup stands for.
        is_gone: whether another has its place by now.
        probe: the question whether it is ready, while it is asked.
    """

    upstream: Upstream
    worker: int
    up: bool = True
    on_probation: bool = False
    failures: int = 0
    answered: float = 0.0
    vouched: float = 0.0
    heard: float = 0.0
    newest: float = 0.0
    silent: int = 0
    agrees: bool = False
    differs: bool = False
    is_gone: bool = False
    probe: asyncio.Task[None] | None = None

    @property
    def is_filled(self) -> bool:
        """Whether there is an upstream."""
        return not isinstance(self.upstream, Nobody)

    def has_answered(self, sent: float, is_ok: bool) -> None:
        """Take down its answer to a call that was sent at that time; an error is no sign of life.

        A server without its model is quick to say so, and would draw all requests.
        """
        self.heard, self.newest = time.monotonic(), max(self.newest, sent)
        if is_ok:
            self.answered, self.silent = self.heard, 0

    def due(self, sent: float, limit: float) -> float:
        """Return when an answer to a call that was sent then is late.

        An upstream that answers older calls is not silent: this one waits its turn there.
        """
        in_turn = self.newest <= sent < self.heard
        return limit + (self.heard if in_turn else sent)

    def is_to_blame(self, others: Collection[Place]) -> bool:
        """Take down a failure; return whether to set the upstream aside, as others are sound."""
        self.failures += 1
        sound = any(other.failures == 0 for other in others)
        return sound and (self.on_probation or self.failures >= MOST_FAILURES)


class Retries:
    """How many calls may be sent to a second upstream: a share of all, so that loads end."""

    def __init__(self) -> None:
        self._saved = MOST_RETRIES

    def earn(self) -> None:
        """Take down a call."""
        self._saved = min(MOST_RETRIES, self._saved + RETRY_SHARE)

    def take(self) -> bool:
        """Use up one, and return whether there was one."""
        if self._saved < 1:
            return False
        self._saved -= 1
        return True
