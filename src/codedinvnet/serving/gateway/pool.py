"""Upstreams as the workers of a pool: what is their own error, what is a failure, who is set aside.

An upstream is set aside when it refuses connections, stays silent, or fails several calls in a row
while others do not. Nothing but probes is sent to it until it says that it is ready. Then one more
failure sets it aside again, for longer: the supervisor waits between two tries. What an upstream
says about a request (a status below 500) is an answer.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, NoReturn

import numpy as np

from codedinvnet.errors import UserError
from codedinvnet.serving.alarm import CatchUp
from codedinvnet.serving.background import Background, log_error
from codedinvnet.serving.gateway.agreement import START_TIMEOUT, Agreement
from codedinvnet.serving.gateway.calls import (
    ANSWERED,
    OVER,
    STOPPED,
    Call,
    Fate,
    NotProtocol,
    Reply,
    Unreachable,
)
from codedinvnet.serving.gateway.places import Place, Retries
from codedinvnet.serving.gateway.upstream_metrics import ERROR, FAILED, OK, UpstreamMetrics
from codedinvnet.serving.gateway.upstreams import Nobody, Upstream
from codedinvnet.serving.logs import log_event
from codedinvnet.serving.supervisor import NOBODY_THERE
from codedinvnet.serving.tracing import note, outgoing
from codedinvnet.serving.workers.pool import Death, GivenUp, Task, WorkerDied, WorkerFailed
from codedinvnet.serving.workers.result import Abandoned, Result

CALL, REPLY = "call", "reply"
"""Names of the one input and the one output of every task."""
PROBE_PERIOD, PROBE_TIMEOUT = 1.0, 1.0
"""Seconds between two looks at upstreams that have not answered since, and for an answer."""
LONGEST = 60.0
"""Seconds after which a call that nobody waits for is cut off."""
LAST_WAIT = 1.0
"""Seconds for such calls when the gateway stops."""
FORGOTTEN = 300.0
"""Seconds after which the figures of an upstream that is gone are told no more."""
MOST_SILENT = 2
"""Probes in a row without an answer, after which an upstream is set aside."""


def boxed(content: object) -> np.ndarray:
    """Return anything as an array of one element, as tasks and results carry it."""
    array = np.empty(1, object)
    array[0] = content
    return array


class UpstreamPool:
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
        places: how many upstreams there may be later; None: as many as now. With a number the pool
            starts even if none answers yet.
        differs: says how an upstream's model differs from the one that a small backup stands for
            (""); it raises Unreachable if nobody can tell. None: nobody asks.
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
    ) -> None:
        self.cancels, self.agreement = cancels, Agreement(model, metrics, differs)
        self.model, self.hang_timeout, self.patience = model, hang_timeout, patience
        self._waits = places is not None
        empty = [Nobody()] * ((places or 0) - len(upstreams))
        self.places = [Place(upstream, i) for i, upstream in enumerate((*upstreams, *empty))]
        self.metrics = metrics
        for upstream in upstreams:
            metrics.up.labels(upstream.url).set(1)
            metrics.expect(upstream.url)
        self.on_death: Death | None = None
        self.on_late: Callable[[int], None] | None = None
        """Called with an attempt that a small backup may answer, and has no answer in time."""
        self._calls: list[set[Fate]] = [set() for _ in self.places]
        """The waits for what each is at."""
        self._left: set[asyncio.Task[Reply]] = set()
        """Calls that nobody waits for."""
        self._retries = Retries()
        self._catch_up = CatchUp()
        self._left_out: set[str] = set()
        """Upstreams for which there is no place."""
        self._changed = asyncio.Event()
        """Is set, and replaced, when upstreams have come or gone."""
        self._background = Background()
        """What else is going on: the watch, and connections that are closed."""

    @property
    def translates(self) -> bool:
        """Whether calls over HTTP may be written anew, for an upstream over gRPC."""
        return any(place.upstream.translates for place in self.places)

    @property
    def is_protected(self) -> bool:
        """Whether a small backup may answer: no upstream is known to have another model."""
        return not any(place.differs for place in self.places)

    async def start(self, size: int) -> None:
        """Ask all upstreams for the model.

        Raises:
            UserError: if one does not have the model, theirs differ, or none answers and no
                others may come.
        """
        there = [place for place in self.places if place.is_filled]
        silent = await self.agreement.begin(there)
        if len(silent) == len(there) and not self._waits:
            told = "; ".join(f"{place.upstream.url}: {reason}" for place, reason in silent)
            raise UserError(f"--upstream: none answers: {told}")
        loop = asyncio.get_running_loop()
        for place, reason in silent:  # once they count as started
            loop.call_soon(self._set_aside, place, reason)
        for place in self.places[len(there) :]:
            loop.call_soon(self._set_aside, place, NOBODY_THERE)
        self._background.spawn(self._watch_all())

    def change(self, urls: Sequence[str], open_one: Callable[[str], Upstream]) -> None:
        """Have these upstreams from now on, and no others; the last have none if places lack.

        Raises:
            UserError: if one cannot be; all is left as it was.
        """
        here = {place.upstream.url for place in self.places if place.is_filled}
        coming = [url for url in urls if url not in here]
        free = len(self.places) - len(here.intersection(urls))
        new = deque(map(open_one, coming[:free]))
        for url in coming[free:]:
            if url not in self._left_out:
                log_event("no place for an upstream", logging.WARNING, upstream=url)
        self._left_out = set(coming[free:])
        if here.issubset(urls) and not new:
            return
        for i, place in enumerate(self.places):
            if place.is_filled and place.upstream.url not in urls:
                self._set_aside(place, NOBODY_THERE)
                self.metrics.up.remove(place.upstream.url)
                self.metrics.differs.remove(place.upstream.url)
                place.is_gone = True
                self._background.spawn(self._gone(place.upstream))
                place = self.places[i] = Place(Nobody(), i, up=False)
            if new and not place.is_filled:
                upstream = new.popleft()
                self.places[i] = Place(upstream, i, up=False)
                self.metrics.expect(upstream.url)
                log_event("upstream added", upstream=upstream.url)
        self._changed.set()
        self._changed = asyncio.Event()

    async def _gone(self, upstream: Upstream) -> None:
        """Close an upstream, and forget its figures once they have been seen."""
        await upstream.close()
        await asyncio.sleep(FORGOTTEN)
        if all(place.upstream.url != upstream.url for place in self.places):
            self.metrics.forget(upstream.url)

    async def call(self, worker: int, task: Task) -> Result:
        place, call = self.places[worker], task.inputs[CALL][0]
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
            if not work.done():
                self._leave(work)
        if work.done() and fate.how in ("", ANSWERED):
            self._catch_up.heard(began)
        elif fate.how == STOPPED:
            self._count(place, STOPPED)
            raise Abandoned("it was stopped")
        else:
            self._count(place, FAILED)
            if fate.how == OVER:
                raise Abandoned("its time is over")
            raise WorkerDied(fate.how)
        seconds, sure = time.monotonic() - began, True
        try:
            reply = work.result()
        except Unreachable as error:
            if time.monotonic() >= call.deadline:
                self._count(place, FAILED)
                raise Abandoned("its time is over") from None
            reply, sure = await self._refused(place, error), False
        self.metrics.seconds.labels(place.upstream.url).observe(seconds)
        place.has_answered(began)
        if reply.fails:
            self._failed(place, call, reply, sure)
        place.failures, place.on_probation = 0, False
        self._count(place, OK if reply.status in (0, 200) else ERROR)
        return Result({REPLY: boxed(reply)}, seconds)

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
            raise WorkerDied(fate.how or "it is lost")
        if call.is_over or not self._retries.take():
            raise WorkerFailed("no more retries: it waits for the small backup")

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
                    self._blamed(place, f"no answer within {self.patience:g} s")
                fate.end(OVER)
            else:
                await self._turn(fate, min(due, end) - now)
            if fate.how:
                return
        ready = False

        async def probe() -> None:
            nonlocal ready
            try:
                ready = await place.upstream.is_ready(self.model, PROBE_TIMEOUT)
            except Unreachable:
                pass
            finally:
                fate.look()

        self._background.spawn(probe())
        await fate.turn()
        if fate.how:
            return
        told, others = f"no answer within {self.hang_timeout:g} s", self._others(place)
        if not ready or place.is_to_blame(others):
            self._blamed(place, told)
        is_alone = call.waits == 1 and not call.has_hung
        is_needed = is_alone and not call.is_over and time.monotonic() < call.deadline
        if is_needed and others and self._retries.take():
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

    async def _refused(self, place: Place, error: Unreachable) -> Reply:
        """Return what an upstream says that refused a call or broke it off.

        Raises:
            WorkerFailed: if it says nothing, but is ready.
            WorkerDied: otherwise, or if it is to blame: it is set aside.
        """
        try:
            asked = error.reply is not None or not place.on_probation
            there = asked and await place.upstream.is_ready(self.model, PROBE_TIMEOUT)
        except Unreachable:
            there = False
        if there and error.reply is not None:
            return error.reply
        self._count(place, FAILED)
        reason = f"{place.upstream.url}: {error}"
        if there and not place.is_to_blame(self._others(place)):
            raise WorkerFailed(reason) from error
        self._set_aside(place, reason)
        raise WorkerDied(reason) from error

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
        if (others or not sure) and self._retries.take():
            raise WorkerFailed(reason)
        raise GivenUp(reason)

    def _others(self, place: Place) -> list[Place]:
        """Return what else is up."""
        return [other for other in self.places if other is not place and other.up]

    def _set_aside(self, place: Place, reason: str) -> None:
        """Send nothing more to an upstream until it is ready again.

        The removal of one that is down already is told, too.
        """
        if not place.up and reason != NOBODY_THERE:
            return
        was_up, place.up = place.up, False
        if was_up and place.is_filled:
            url = place.upstream.url
            self.metrics.up.labels(url).set(0)
            log_event("upstream set aside", logging.WARNING, upstream=url, reason=reason)
        if self.on_death is not None:
            self.on_death(place.worker, reason)

    def _give_up(self, worker: int, reason: str) -> None:
        """Wait no longer for what a worker is at."""
        for fate in self._calls[worker]:
            fate.end(reason)

    def _leave(self, work: asyncio.Task[Reply]) -> None:
        """Let a call end by itself, or cancel it."""
        if self.cancels:
            work.cancel()
        self._left.add(work)

    def _ended(self, work: asyncio.Task[Reply]) -> None:
        self._left.discard(work)
        if not work.cancelled():
            work.exception()  # perhaps nobody asks for it

    async def replace(self, worker: int) -> None:
        """Return when an upstream is ready; it is at nothing then.

        Raises:
            Unreachable: if it is not.
            NotProtocol: if it has the model no longer, or another one.
        """
        if self.places[worker].up:  # not found out here, but by others
            self._set_aside(self.places[worker], "it failed, or was silent for too long")
        self._give_up(worker, "it is lost")
        while not self.places[worker].is_filled:
            await self._changed.wait()
        place = self.places[worker]
        if place.probe is None or place.probe.done():
            place.probe = asyncio.create_task(self._probe(place))
        await asyncio.shield(place.probe)
        if place is not self.places[worker]:
            raise Unreachable("another upstream has its place")

    async def _probe(self, place: Place) -> None:
        try:
            if not await place.upstream.is_ready(self.model, PROBE_TIMEOUT):
                raise Unreachable("it is not ready")
            if not place.up:
                await self.agreement.check(place, PROBE_TIMEOUT)
        except (Unreachable, NotProtocol) as error:
            self._set_aside(place, str(error))
            raise
        if not place.up and place is self.places[place.worker]:
            place.up = place.on_probation = True
            place.failures = place.silent = 0
            place.answered = time.monotonic()
            self.metrics.up.labels(place.upstream.url).set(1)
            log_event("upstream is back", upstream=place.upstream.url)

    async def _watch_all(self) -> None:
        while True:
            await asyncio.sleep(PROBE_PERIOD)
            now = time.monotonic()
            quiet = [p for p in self.places if p.up and now - p.answered > PROBE_PERIOD]
            looks = await asyncio.gather(*map(self._look, quiet), return_exceptions=True)
            for error in looks:  # the others are looked at all the same
                if error is not None:
                    log_error(error)

    async def _look(self, place: Place) -> None:
        """Ask an upstream that has not answered for a while whether it is ready."""
        try:
            ready = await place.upstream.is_ready(self.model, PROBE_TIMEOUT)
            reason = "it is not ready"
        except Unreachable as error:
            ready, reason = False, str(error)
        if ready:
            place.silent, place.answered = 0, time.monotonic()
            return
        place.silent += 1
        if self._others(place) and place.silent >= MOST_SILENT:
            self._set_aside(place, reason)

    async def model_metadata(self, version: str) -> Mapping[str, Any]:
        """Return the model's metadata, of a version that an upstream has.

        Raises:
            NotProtocol: if the first upstream that answers has none.
            Unreachable: if none answers, or has answered since the start.
        """
        if not version:
            if not self.agreement.metadata:
                raise Unreachable("no upstream has been up yet")
            return self.agreement.metadata
        reason = "no upstream is up"
        for place in self.places:
            if place.up:
                try:
                    return await place.upstream.metadata(self.model, version, START_TIMEOUT)
                except Unreachable as error:
                    reason = str(error)
        raise Unreachable(reason)

    async def stop(self) -> None:
        await self._background.stop()
        probes = [place.probe for place in self.places if place.probe is not None]
        for probe in probes:
            probe.cancel()
        await asyncio.gather(*probes, return_exceptions=True)
        if self._left:
            await asyncio.wait(self._left, timeout=LAST_WAIT)
        await asyncio.gather(*(place.upstream.close() for place in self.places))

    def pid(self, worker: int) -> int | None:
        return None
