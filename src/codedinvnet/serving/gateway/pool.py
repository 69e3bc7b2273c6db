"""Upstreams as the workers of a pool: what is their own error, what is a failure, who is set aside.

An upstream is set aside when it refuses connections, stays silent, or fails several calls in a row
while others do not. What it says about a request (`Reply.fails` tells) is an answer, unless it says
that it has no such model and is not ready.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import replace
from typing import NoReturn

import numpy as np

from codedinvnet.serving.alarm import CatchUp
from codedinvnet.serving.gateway.calls import (
    ABSENT,
    ANSWERED,
    MOST_BREAKS,
    OVER,
    STOPPED,
    Call,
    Fate,
    NoFiles,
    Reply,
    Unreachable,
    problem,
)
from codedinvnet.serving.gateway.places import Place, Retries
from codedinvnet.serving.gateway.roster import PROBE_PERIOD, Roster
from codedinvnet.serving.gateway.upstream_metrics import (
    ERROR,
    FAILED,
    OK,
    REFUSED,
    SENT,
    UpstreamMetrics,
)
from codedinvnet.serving.gateway.upstreams import Upstream
from codedinvnet.serving.tracing import note, outgoing
from codedinvnet.serving.workers.pool import SILENT, GivenUp, Task, WorkerDied, WorkerFailed
from codedinvnet.serving.workers.result import Abandoned, Result

CALL, REPLY = "call", "reply"
"""Names of the one input and the one output of every task."""
LONGEST = 60.0
"""Seconds after which a call that nobody waits for is cut off."""
LAST_WAIT = 1.0
"""Seconds for such calls when the gateway stops; over gRPC as long as its patience."""
BREAKS = f"connections broke over it: {MOST_BREAKS} upstreams get it at most"


def boxed(content: object) -> np.ndarray:
    """Return anything as an array of one element, as tasks and results carry it."""
    array = np.empty(1, object)
    array[0] = content
    return array


class UpstreamPool(Roster):
    """A pool whose workers are upstreams, each of which may be at several calls.

    Args:
        upstreams: the servers.
        model: the name of the model that all of them have.
        hang_timeout: seconds without an answer after which another upstream may be asked.
        metrics: where its calls are counted.
        patience: seconds after which an upstream may be at something else than a call.
        cancels: whether upstreams over gRPC are told by when an answer is needed, and to stop when
            none is. Otherwise what nobody waits for is left to end by itself: some versions of
            Triton crash when requests are cancelled.
        places: see `Roster`.
        differs: likewise.
        follows: likewise.
    """

    def __init__(
        self,
        upstreams: Sequence[Upstream],
        model: str,
        hang_timeout: float,
        metrics: UpstreamMetrics,
        *,
        patience: float = LONGEST,
        cancels: bool = False,
        places: int | None = None,
        differs: Callable[[Upstream], Awaitable[str]] | None = None,
        follows: bool = True,
    ) -> None:
        super().__init__(upstreams, model, metrics, places, differs, follows)
        self.hang_timeout, self.patience, self.cancels = hang_timeout, patience, cancels
        self.on_late: Callable[[int], None] | None = None
        """Called with an attempt that a small backup may answer, and has no answer in time."""
        self._left: set[asyncio.Task[Reply]] = set()
        """Calls that nobody waits for."""
        self._retries = Retries()
        self._catch_up = CatchUp()

    @property
    def translates(self) -> bool:
        """Whether calls over HTTP may be written anew, for an upstream over gRPC."""
        return any(place.upstream.translates for place in self.places)

    async def call(self, worker: int, task: Task) -> Result:
        place, call = self.places[worker], task.inputs[CALL][0]
        if call.is_suspect:  # sent anew with all that its last upstream was at, or as a copy
            self._broken(call, call.refusal, BREAKS)
        if call.is_lost:
            await self._backup_first(place, call)
        began = time.monotonic()
        self._retries.earn()
        left = max(call.deadline - began, 0.001 if self.cancels else LONGEST)
        headers = outgoing(call.headers, place.upstream.url)
        asked = call if headers is call.headers else replace(call, headers=headers)
        loop, fate = asyncio.get_running_loop(), Fate()
        work = loop.create_task(place.upstream.infer(asked, left))
        work.add_done_callback(lambda _: fate.end(ANSWERED))
        work.add_done_callback(self._ended)
        self._calls[worker].add(fate)
        call.waits += 1
        if self.cancels and place.upstream.stops:
            call.running.add(fate)
        try:
            await self._turn(fate, min(self.hang_timeout, self.patience))
            if not fate.how and not work.done():
                if call.backed is not None and self.on_late is not None:
                    self.on_late(task.attempt)
                await self._late(place, call, fate, began)
        finally:
            call.waits -= 1
            call.running.discard(fate)
            self._calls[worker].discard(fate)
            seconds = time.monotonic() - began
            self.metrics.seconds.labels(place.upstream.url).observe(seconds)
            if not work.done():
                self._leave(work)
        if work.done() and fate.how in ("", ANSWERED):
            self._catch_up.heard(began)
        elif fate.how == STOPPED:
            self._count(place, STOPPED)
            raise Abandoned("it was stopped")
        else:
            self._count(place, STOPPED if place.is_gone else FAILED)
            if fate.how == OVER:
                raise Abandoned("its time is over")
            raise WorkerDied(fate.how)
        sure = True
        try:
            reply = work.result()
        except Unreachable as error:
            if time.monotonic() >= call.deadline:
                self._count(place, FAILED)
                raise Abandoned("its time is over") from None
            reply, sure = await self._refused(place, call, error), False
        place.has_answered(began, reply.is_ok)
        if reply.fails:
            self._failed(place, call, reply, sure)
        if reply.status == ABSENT[reply.transport] and not await self._has_model(place):
            call.refusal = reply
            self._blamed(place, str(reply))
        place.failures, place.on_probation = 0, False
        self._count(place, OK if reply.is_ok else ERROR)
        return Result({REPLY: boxed(reply)}, seconds, is_usual=reply.is_ok)

    async def _has_model(self, place: Place) -> bool:
        """Tell whether an upstream is ready though it says that it has no such model, or version.

        Once it says that it is, nobody asks for a second. The last one that is up is believed.
        """
        if time.monotonic() - place.vouched < PROBE_PERIOD or not self._others(place):
            return True
        try:
            ready = await self._is_ready(place)
        except Unreachable:  # which the watch finds out
            return True
        if ready:
            place.vouched = time.monotonic()
        return ready

    async def _backup_first(self, place: Place, call: Call) -> None:
        """Let the small backup answer a lost call; return if the upstream is to be asked after all.

        Raises:
            WorkerFailed: if it is not.
            WorkerDied: if the upstream is lost meanwhile.
        """
        fate, calls = Fate(), self._calls[place.worker]
        calls.add(fate)
        try:
            await self._turn(fate, call.backed or 0.0)
        finally:
            calls.discard(fate)
        if fate.how or not place.up:
            raise WorkerDied(fate.how or self._why(place.worker))
        if call.is_over or call.breaks >= MOST_BREAKS or not self._may_retry():
            raise WorkerFailed("no more retries: it waits for the small backup", blamed=False)

    async def _turn(self, fate: Fate, seconds: float) -> None:
        """Wait for a call's end for so long at most, or until there is something to look at."""
        loop = asyncio.get_running_loop()
        timer = loop.call_later(seconds, self._catch_up.put_off, fate.look)
        try:
            await fate.turn()
        finally:
            timer.cancel()

    async def _late(self, place: Place, call: Call, fate: Fate, began: float) -> None:
        """Wait on for an answer that is not here in time; return once that wait has ended.

        The upstream keeps the call, and its slot, unless another may be asked: what is given up
        is computed all the same, beside what comes in its place.

        Raises:
            WorkerFailed: if another is to be asked, which happens once in a call, and not while
                another is at it already.
            WorkerDied: likewise, and the upstream is set aside: it is to blame, or not ready.
        """
        end = began + self.patience
        while (now := time.monotonic()) < (due := place.due(began, self.hang_timeout)):
            if now >= end:
                if place.heard < began and place.is_to_blame(self._others(place)):
                    self._blamed(place, f"{SILENT} {self.patience:g} s")
                fate.end(OVER)
            else:
                await self._turn(fate, min(due, end) - now)
            if fate.how:
                return
        ready: bool | None = None  # nobody knows

        async def probe() -> None:
            nonlocal ready
            try:
                ready = await self._is_ready(place)
            except NoFiles:
                pass
            except Unreachable:
                ready = False
            finally:
                fate.look()

        self._background.spawn(probe())
        await fate.turn()
        if fate.how:
            return
        told, others = f"{SILENT} {self.hang_timeout:g} s", self._others(place)
        if ready is False or (ready and place.is_to_blame(others)):
            self._blamed(place, told)
        is_alone = call.waits == 1 and not call.has_hung
        is_needed = is_alone and not call.is_over and time.monotonic() < call.deadline
        if ready and is_needed and others and self._may_retry():
            self._count(place, FAILED)
            call.has_hung = True
            raise WorkerFailed(f"{place.upstream.url}: {told}")
        over = asyncio.get_running_loop().call_later(
            max(0.0, end - time.monotonic()), fate.end, OVER
        )
        try:
            while not fate.how:
                await fate.turn()
        finally:
            over.cancel()

    def _blamed(self, place: Place, reason: str) -> NoReturn:
        """Set an upstream aside by what a call met there.

        Raises:
            WorkerDied: always.
        """
        self._count(place, FAILED)
        reason = f"{place.upstream.url}: {reason}"
        self._set_aside(place, reason)
        raise WorkerDied(reason)

    def _count(self, place: Place, result: str) -> None:
        self.metrics.calls.labels(place.upstream.url, result).inc()
        note(result)

    def _may_retry(self) -> bool:
        """Use up a retry, and count whether there was one."""
        taken = self._retries.take()
        self.metrics.retries.labels(SENT if taken else REFUSED).inc()
        return taken

    async def _refused(self, place: Place, call: Call, error: Unreachable) -> Reply:
        """Return what an upstream says that refused a call or broke it off.

        Raises:
            WorkerFailed: if it says nothing, but is ready; or if it could not be asked.
            WorkerDied: otherwise, or if it is to blame: it is set aside.
            GivenUp: if it may have been at the call, and no other is to be.
        """
        call.breaks += error.sent  # at once: others may send the call anew
        try:
            if isinstance(error, NoFiles):
                raise error
            asked = error.reply is not None or not place.on_probation
            there = asked and await self._is_ready(place)
        except NoFiles as own:
            self._not_asked(call, own)
        except Unreachable:
            there = False
        if there and error.reply is not None and not error.sent:
            return error.reply
        self._count(place, FAILED)
        reason = f"{place.upstream.url}: {error}"
        is_lost = not there or place.is_to_blame(self._others(place))
        if error.sent and (call.is_suspect or not self._may_retry()):
            if is_lost:  # once this call has ended, which would be sent anew with the others
                asyncio.get_running_loop().call_soon(self._set_aside, place, reason)
            self._broken(call, error.reply, reason)
        if not is_lost:
            raise WorkerFailed(reason) from error
        self._set_aside(place, reason)
        raise WorkerDied(reason) from error

    def _broken(self, call: Call, said: Reply | None, reason: str) -> NoReturn:
        """End a call over which connections broke: it may be what upstreams break by.

        Args:
            call: the client's.
            said: what it gets; None: 502, or UNAVAILABLE over gRPC.
            reason: why.

        Raises:
            WorkerFailed: if a small backup may answer it.
            GivenUp: otherwise.
        """
        note(FAILED)
        http = call.transport == "http"
        own = problem(502, reason) if http else Reply("grpc", 14, message=reason)
        call.refusal = own if said is None else said
        if call.backed is not None:
            call.is_lost = True
            raise WorkerFailed(reason, blamed=False)
        raise GivenUp(reason, blamed=False)

    def _not_asked(self, call: Call, error: NoFiles) -> NoReturn:
        """End a call for which this process had no connection; no upstream is to blame.

        Raises:
            WorkerFailed: if a small backup may answer it.
            GivenUp: otherwise.
        """
        note(FAILED)
        told, http = f"overloaded: {error}", call.transport == "http"
        call.refusal = problem(503, told) if http else Reply("grpc", 14, message=told)
        if call.backed is not None:
            call.is_lost = True
            raise WorkerFailed(str(error), blamed=False) from error
        raise GivenUp(str(error), blamed=False) from error

    def _failed(self, place: Place, call: Call, reply: Reply, sure: bool) -> NoReturn:
        """Take an answer by which an upstream failed.

        If it is not sure that the upstream said so, a lone one may be asked again. What a small
        backup answers for is left to it, and only asked again out of the retries' budget.

        Raises:
            WorkerFailed: if another is to be asked, or the same again, or the backup.
            WorkerDied: likewise, and the upstream is set aside.
            GivenUp: if the answer is to go to the client.
        """
        self._count(place, FAILED)
        call.refusal = reply
        reason = f"{place.upstream.url}: {reply}"
        others = self._others(place)
        if place.is_to_blame(others):
            self._set_aside(place, reason)
            raise WorkerDied(reason)
        if call.backed is not None:
            call.is_lost = True
            raise WorkerFailed(reason)
        if (others or not sure) and self._may_retry():
            raise WorkerFailed(reason)
        raise GivenUp(reason)

    def _leave(self, work: asyncio.Task[Reply]) -> None:
        """Let a call end by itself, or cancel it."""
        if self.cancels:
            work.cancel()
        self._left.add(work)

    def _ended(self, work: asyncio.Task[Reply]) -> None:
        self._left.discard(work)
        if not work.cancelled():
            work.exception()  # perhaps nobody asks for it

    async def stop(self) -> None:
        await self.close()
        if self._left:
            await asyncio.wait(self._left, timeout=LAST_WAIT)
        upstreams = {*self._going, *(place.upstream for place in self.places)}
        await asyncio.gather(*(upstream.close(self.patience) for upstream in upstreams))

    def pid(self, worker: int) -> int | None:
        return None
