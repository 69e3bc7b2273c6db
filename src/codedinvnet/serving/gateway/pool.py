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
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from codedinvnet.errors import UserError
from codedinvnet.serving.alarm import CatchUp
from codedinvnet.serving.background import Background, log_error
from codedinvnet.serving.gateway.calls import STOPPED, Call, NotProtocol, Reply, Unreachable
from codedinvnet.serving.gateway.upstream_metrics import ERROR, FAILED, OK, UpstreamMetrics
from codedinvnet.serving.gateway.upstreams import Nobody, Upstream, difference
from codedinvnet.serving.logs import log_event
from codedinvnet.serving.supervisor import NOBODY_THERE
from codedinvnet.serving.tracing import note, outgoing
from codedinvnet.serving.workers.pool import Death, Task, WorkerDied, WorkerFailed
from codedinvnet.serving.workers.result import Abandoned, Result

ANSWERED, HANGS = "answered", "hangs"
"""How a wait for an upstream ends, beside its being stopped or lost."""
CALL, REPLY = "call", "reply"
"""Names of the one input and the one output of every task."""
PROBE_PERIOD, PROBE_TIMEOUT = 1.0, 1.0
"""Seconds between two looks at upstreams that have not answered since, and for an answer."""
START_TIMEOUT = 5.0
"""Seconds for an answer about the model."""
LONGEST = 60.0
"""Seconds after which a call that nobody waits for is cut off."""
LAST_WAIT = 1.0
"""Seconds for such calls when the gateway stops."""
FORGOTTEN = 300.0
"""Seconds after which the figures of an upstream that is gone are told no more."""
MOST_SILENT = 2
"""Probes in a row without an answer, after which an upstream is set aside."""
MOST_FAILURES = 3
"""Failed calls in a row, likewise, unless all upstreams fail."""
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
        failures: calls in a row that it failed.
        answered: when it last answered anything.
        silent: probes in a row that it did not answer.
        differs: whether its model is another one than the small backup stands for.
        probe: the question whether it is ready, while it is asked.
    """

    upstream: Upstream
    worker: int
    up: bool = True
    on_probation: bool = False
    failures: int = 0
    answered: float = 0.0
    silent: int = 0
    differs: bool = False
    probe: asyncio.Task[None] | None = None

    @property
    def is_filled(self) -> bool:
        """Whether there is an upstream."""
        return not isinstance(self.upstream, Nobody)


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
        hang_timeout: seconds without an answer after which another upstream is asked.
        metrics: where its calls are counted.
        cancels: whether upstreams over gRPC are told by when an answer is needed, and to stop when
            none is. Otherwise what nobody waits for is left to end by itself: some versions of
            Triton crash when requests are cancelled.
        places: how many upstreams there may be later; None: as many as now.
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
        cancels: bool = False,
        places: int | None = None,
        differs: Callable[[Upstream], Awaitable[str]] | None = None,
    ) -> None:
        self.cancels, self._differs = cancels, differs
        self.model, self.hang_timeout = model, hang_timeout
        empty = [Nobody()] * ((places or 0) - len(upstreams))
        self.places = [Place(upstream, i) for i, upstream in enumerate((*upstreams, *empty))]
        self.metrics = metrics
        for upstream in upstreams:
            metrics.up.labels(upstream.url).set(1)
            metrics.expect(upstream.url)
        self.on_death: Death | None = None
        self.metadata: Mapping[str, Any] = {}
        """The model's, on which all upstreams agree."""
        self._first = ""
        """The upstream that said so first."""
        self._calls: list[set[asyncio.Future[str]]] = [set() for _ in self.places]
        """What each is at: futures that say why nobody waits for the answer any more."""
        self._left: set[asyncio.Task[Reply]] = set()
        """Calls that nobody waits for."""
        self._retries = MOST_RETRIES
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

    async def _check(self, place: Place) -> None:
        """Find out whether an upstream has the model that a small backup stands for.

        Raises:
            Unreachable: if it does not answer.
        """
        told = "" if self._differs is None else await self._differs(place.upstream)
        if bool(told) != place.differs and place is self.places[place.worker]:
            place.differs = bool(told)
            url, event = place.upstream.url, "upstream has the protected model again"
            if told:
                event = "upstream has another model: the small backup does not answer"
            self.metrics.differs.labels(url).set(place.differs)
            log_event(event, logging.WARNING if told else logging.INFO, upstream=url, reason=told)

    async def start(self, size: int) -> None:
        """Ask all upstreams for the model.

        Raises:
            UserError: if none answers, one does not have the model, or theirs differ.
        """
        there = [place for place in self.places if place.is_filled]
        asked = [place.upstream.metadata(self.model, "", START_TIMEOUT) for place in there]
        found = await asyncio.gather(*asked, return_exceptions=True)
        silent = {}
        for place, answer in zip(there, found, strict=True):
            if isinstance(answer, Unreachable):
                silent[place.upstream.url] = (place, str(answer))
            elif isinstance(answer, NotProtocol):
                raise UserError(f"--upstream: {place.upstream.url}: {answer}")
            elif isinstance(answer, BaseException):
                raise answer
            elif told := self._compare(place, answer):
                raise UserError(f"--upstream: {told}")
        for place in there:
            if place.upstream.url not in silent:
                try:
                    await self._check(place)
                except Unreachable as error:
                    silent[place.upstream.url] = (place, str(error))
        if len(silent) == len(there):
            told = "; ".join(f"{url}: {reason}" for url, (_, reason) in silent.items())
            raise UserError(f"--upstream: none answers: {told}")
        loop = asyncio.get_running_loop()
        for place, reason in silent.values():  # once they count as started
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

    def _compare(self, place: Place, metadata: Mapping[str, Any]) -> str:
        """Take an upstream's metadata for the model's, or say how they differ from others' ("")."""
        if not self.metadata:
            self.metadata, self._first = metadata, place.upstream.url
        told = difference(self.metadata, metadata)
        both = f"{place.upstream.url} and {self._first} have different models"
        return f"{both}: {told}" if told else ""

    async def call(self, worker: int, task: Task) -> Result:
        place, call = self.places[worker], task.inputs[CALL][0]
        began = time.monotonic()
        self._retries = min(MOST_RETRIES, self._retries + RETRY_SHARE)
        left = max(call.deadline - began, 0.001) if self.cancels else LONGEST
        headers = outgoing(call.headers, place.upstream.url)
        asked = call if headers is call.headers else replace(call, headers=headers)
        loop = asyncio.get_running_loop()
        fate: asyncio.Future[str] = loop.create_future()

        def ends(how: str) -> None:
            if not fate.done():
                fate.set_result(how)

        work = loop.create_task(place.upstream.infer(asked, left))
        work.add_done_callback(lambda _: ends(ANSWERED))
        work.add_done_callback(self._ended)
        timer = loop.call_later(self.hang_timeout, self._catch_up.put_off, lambda: ends(HANGS))
        self._calls[worker].add(fate)
        if self.cancels and place.upstream.stops:
            call.running.add(fate)
        try:
            how = await fate
        finally:
            timer.cancel()
            call.running.discard(fate)
            self._calls[worker].discard(fate)
            if not work.done():
                self._leave(work)
        if how == HANGS and work.done():  # after all
            how = ANSWERED
        if how == ANSWERED:
            self._catch_up.heard(began)
        if how == STOPPED:
            self._count(place, STOPPED)
            raise Abandoned("it was stopped")
        if how not in (ANSWERED, HANGS):
            self._count(place, FAILED)
            raise WorkerDied(how)
        seconds, sure = time.monotonic() - began, True
        try:
            if how == HANGS:
                raise Unreachable(f"no answer within {self.hang_timeout:g} s")
            reply = work.result()
        except Unreachable as error:
            if how == ANSWERED and time.monotonic() >= call.deadline:
                self._count(place, FAILED)
                raise Abandoned("its time is over") from None
            reply, sure = await self._refused(place, error), False
        self.metrics.seconds.labels(place.upstream.url).observe(seconds)
        place.answered, place.silent = time.monotonic(), 0
        if reply.fails:
            self._failed(place, call, reply, sure)
        else:
            place.failures, place.on_probation = 0, False
            self._count(place, OK if reply.status in (0, 200) else ERROR)
        return Result({REPLY: boxed(reply)}, seconds)

    def _count(self, place: Place, result: str) -> None:
        self.metrics.calls.labels(place.upstream.url, result).inc()
        note(result)

    async def _refused(self, place: Place, error: Unreachable) -> Reply:
        """Return what an upstream says that refused a call, broke it off or was silent.

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
        if there and not self._is_to_blame(place):
            raise WorkerFailed(reason) from error
        self._set_aside(place, reason)
        raise WorkerDied(reason) from error

    def _failed(self, place: Place, call: Call, reply: Reply, sure: bool) -> None:
        """Take an answer by which an upstream failed; return if it is to go to the client.

        If it is not sure that the upstream said so, a lone one may be asked again.

        Raises:
            WorkerFailed: if another is to be asked, or the same again.
            WorkerDied: likewise, and the upstream is set aside.
        """
        self._count(place, FAILED)
        call.refusal = reply
        reason = f"{place.upstream.url}: {reply}"
        if self._is_to_blame(place):
            self._set_aside(place, reason)
            raise WorkerDied(reason)
        others = any(other.up for other in self.places if other is not place)
        if self._retries >= 1 and (others or not sure):
            self._retries -= 1
            raise WorkerFailed(reason)

    def _is_to_blame(self, place: Place) -> bool:
        """Take down a failure; return whether to set the upstream aside, as others are sound."""
        place.failures += 1
        others = (other for other in self.places if other is not place and other.up)
        sound = any(other.failures == 0 for other in others)
        return sound and (place.on_probation or place.failures >= MOST_FAILURES)

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
            if not fate.done():
                fate.set_result(reason)

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
                metadata = await place.upstream.metadata(self.model, "", PROBE_TIMEOUT)
                if told := self._compare(place, metadata):
                    raise NotProtocol(told)
                await self._check(place)
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
        others = any(other.up for other in self.places if other is not place)
        if others and place.silent >= MOST_SILENT:
            self._set_aside(place, reason)

    async def model_metadata(self, version: str) -> Mapping[str, Any]:
        """Return the model's metadata, of a version that an upstream has.

        Raises:
            NotProtocol: if the first upstream that answers has none.
            Unreachable: if none answers.
        """
        if not version:
            return self.metadata
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
