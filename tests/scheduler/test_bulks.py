"""Queries that differ in how long they take, as a gateway's requests with their batches do."""

from __future__ import annotations

import heapq
import random

import pytest

from codedinvnet.scheduler.actions import Action, Send
from codedinvnet.scheduler.events import Completed, Submit, TimerDue
from codedinvnet.scheduler.policies import HEDGE
from codedinvnet.scheduler.scheduler import Scheduler
from codedinvnet.scheduler.settings import Rules

ROW = 0.01
SMALL, LARGE = 1, 32
"""Rows of nine tenths of the requests, and of the others."""
WORKERS, LOAD = 4, 0.4
LEARNT = 600
"""Requests after which the times of both are known."""


class Upstreams:
    """Workers that take ROW seconds a row, and are never late.

    Args:
        slots: how many requests each may be at.
        in_turn: whether it computes them one after the other.
    """

    def __init__(self, slots: int, in_turn: bool) -> None:
        self.scheduler = Scheduler(Rules(WORKERS, HEDGE, hang_timeout=10.0, slots=slots))
        self.in_turn = in_turn
        self.now = self.work = self.asked = 0.0
        self.called_slow = 0
        self._free = [0.0] * WORKERS
        self._rows: dict[int, int] = {}
        self._due: list[tuple[float, int]] = []
        self._random = random.Random(0)

    def serve(self, requests: int) -> None:
        """Answer so many requests."""
        scheduler, mean = self.scheduler, ROW * (0.9 * SMALL + 0.1 * LARGE)
        for _ in range(requests):
            self._pass(self._random.expovariate(LOAD * WORKERS / mean))
            rows = LARGE if self._random.random() < 0.1 else SMALL
            query = len(self._rows)
            self._rows[query] = rows
            self.asked += ROW * rows
            asked = Submit((query,), self.now + 60.0, size_class=rows.bit_length())
            self._carry_out(scheduler.handle(self.now, asked))
            self.called_slow += len(scheduler.stats.slow)

    def _pass(self, seconds: float) -> None:
        """Let time pass, and what is due happen."""
        until = self.now + seconds
        while True:
            timer = self.scheduler.next_timer()
            done = self._due[0][0] if self._due else until
            at = min(done, until if timer is None else max(timer, self.now))
            if at >= until:
                break
            self.now = at
            if at == done:
                attempt = heapq.heappop(self._due)[1]
                self._carry_out(self.scheduler.handle(at, Completed(attempt)))
            else:
                self._carry_out(self.scheduler.handle(at, TimerDue()))
        self.now = until

    def _carry_out(self, actions: list[Action]) -> None:
        for action in actions:
            if isinstance(action, Send):
                seconds = ROW * self._rows[action.members[0]]
                self.work += seconds
                began = max(self.now, self._free[action.worker]) if self.in_turn else self.now
                self._free[action.worker] = began + seconds
                heapq.heappush(self._due, (began + seconds, action.attempt))


@pytest.mark.parametrize(("slots", "in_turn"), [(1, False), (4, False), (4, True)])
def test_large_requests_among_small_ones_are_not_late(slots: int, in_turn: bool) -> None:
    upstreams = Upstreams(slots, in_turn)
    upstreams.serve(LEARNT)
    copies, upstreams.called_slow = upstreams.scheduler.dispatcher.hedges, 0
    upstreams.serve(1000)
    copies = upstreams.scheduler.dispatcher.hedges - copies
    assert copies <= 10 * in_turn, "a hundredth of what a fixed budget would send"
    assert upstreams.called_slow <= 0.02 * 1000 * WORKERS * in_turn
    assert upstreams.work <= 1.02 * upstreams.asked
