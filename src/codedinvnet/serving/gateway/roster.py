"""Which upstreams there are, which of them are up, and how one that was set aside comes back.

Nothing but probes is sent to one that was set aside until it says that it is ready. Then one more
failure sets it aside again, for longer: the supervisor waits between two tries.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any

from codedinvnet.errors import UserError
from codedinvnet.serving.background import Background, log_error
from codedinvnet.serving.gateway.agreement import START_TIMEOUT, Agreement
from codedinvnet.serving.gateway.calls import Fate, NoFiles, NotProtocol, Unreachable
from codedinvnet.serving.gateway.places import Place
from codedinvnet.serving.gateway.upstream_metrics import UpstreamMetrics
from codedinvnet.serving.gateway.upstreams import Nobody, Upstream
from codedinvnet.serving.gateway.versions import Versions
from codedinvnet.serving.logs import log_event
from codedinvnet.serving.supervisor import NOBODY_THERE
from codedinvnet.serving.workers.pool import Death

PROBE_PERIOD, PROBE_TIMEOUT = 1.0, 1.0
"""Seconds between two looks at upstreams that have not answered since, and for an answer."""
AT_ONCE, SPREAD = 10, 0.5
"""Upstreams that are looked at in one turn, and the part of the period that has these turns: a
request waits for one of them at most."""
FORGOTTEN = 300.0
"""Seconds after which the figures of an upstream that is gone are told no more."""
MOST_SILENT = 2
"""Probes in a row without an answer, after which an upstream is set aside."""


class Roster:
    """The upstreams' places, as many as there are workers.

    Args:
        upstreams: the servers.
        model: the name of the model that all of them have.
        metrics: tell which are up.
        places: how many upstreams there may be later; None: as many as now. With a number the
            gateway starts even if none answers yet.
        differs: says how an upstream's model differs from the one that a small backup stands for
            (""); it raises Unreachable if nobody can tell. None: nobody asks.
        follows: whether the model may become another one, once all upstreams have that.
    """

    def __init__(
        self,
        upstreams: Sequence[Upstream],
        model: str,
        metrics: UpstreamMetrics,
        places: int | None = None,
        differs: Callable[[Upstream], Awaitable[str]] | None = None,
        follows: bool = True,
    ) -> None:
        self.model, self.metrics = model, metrics
        self.agreement = Agreement(model, metrics, differs, self._all_but, follows)
        self.versions = Versions(
            self._metadata, lambda: self.agreement.metadata.get("versions") or ()
        )
        self._waits = places is not None
        empty = [Nobody()] * ((places or 0) - len(upstreams))
        self.places = [Place(upstream, i) for i, upstream in enumerate((*upstreams, *empty))]
        for upstream in upstreams:
            metrics.up.labels(upstream.url).set(1)
            metrics.expect(upstream.url)
        self.on_death: Death | None = None
        self._calls: list[set[Fate]] = [set() for _ in self.places]
        """The waits for what each is at, of whoever sends calls."""
        self._going: set[Upstream] = set()
        """Upstreams that were removed, while they are at calls."""
        self._removed: dict[str, Upstream] = {}
        """URL -> the upstream that was removed last, until its figures are forgotten."""
        self.first = 0
        """The number of the first place among all workers, for the log."""
        self._lost: dict[int, str] = {}
        """Place -> why its upstream was set aside last, with its URL."""
        self._left_out: set[str] = set()
        """Upstreams for which there is no place."""
        self._changed = asyncio.Event()
        """Is set, and replaced, when upstreams have come or gone."""
        self._background = Background()
        """What else is going on: the watch, and connections that are closed."""

    @property
    def is_protected(self) -> bool:
        """Whether a small backup may answer: no upstream is known to have another model."""
        return not any(place.differs for place in self.places)

    async def start(self, size: int) -> None:
        """Ask all upstreams for the model.

        Raises:
            UserError: if none has the model, or none answers, and no others may come; or, where
                the model is to stay the same, if one has it not.
        """
        there = [place for place in self.places if place.is_filled]
        silent = await self.agreement.begin(there, self._waits)
        if len(silent) == len(there) and not self._waits:
            told = "; ".join(f"{place.upstream.url}: {reason}" for place, reason in silent)
            raise UserError(f"--upstream: none answers: {told}")
        for place in there:
            log_event("upstream added", **self._told(place))
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
                self._going.add(place.upstream)
                self._removed[place.upstream.url] = place.upstream
                self._background.spawn(self._gone(place.upstream))
                place = self.places[i] = Place(Nobody(), i, up=False)
            if new and not place.is_filled:
                upstream = new.popleft()
                self.places[i] = Place(upstream, i, up=False)
                self.metrics.expect(upstream.url)
                log_event("upstream added", **self._told(self.places[i]))
        self._changed.set()
        self._changed = asyncio.Event()

    async def _gone(self, upstream: Upstream) -> None:
        """Close an upstream when its calls have ended; later forget its figures."""
        await upstream.close(None)
        self._going.discard(upstream)
        await asyncio.sleep(FORGOTTEN)
        if self._removed.get(upstream.url) is not upstream:  # it came back, and was removed again
            return
        del self._removed[upstream.url]
        if all(place.upstream.url != upstream.url for place in self.places):
            self.metrics.forget(upstream.url)

    def _all_but(self, place: Place) -> list[Place]:
        """Return the other places."""
        return [other for other in self.places if other is not place]

    def _others(self, place: Place) -> list[Place]:
        """Return what else is up."""
        return [other for other in self._all_but(place) if other.up]

    def _set_aside(self, place: Place, reason: str) -> None:
        """Send nothing more to an upstream until it is ready again.

        The removal of one that is down already is told, too.
        """
        if not place.up and reason != NOBODY_THERE:
            return
        was_up, place.up, url = place.up, False, place.upstream.url
        told = reason if url in reason else f"{url}: {reason}"
        if was_up and place.is_filled:
            self._lost[place.worker] = told
            self.metrics.up.labels(url).set(0)
            log_event("upstream set aside", logging.WARNING, **self._told(place), reason=reason)
        if self.on_death is not None:
            self.on_death(place.worker, reason if reason == NOBODY_THERE else told)

    def _told(self, place: Place) -> dict[str, Any]:
        """Return what the log tells of a place."""
        return {"upstream": place.upstream.url, "worker": self.first + place.worker}

    def _why(self, worker: int) -> str:
        """Return why what a worker is at is lost."""
        return self._lost.get(worker, "it is lost")

    def _give_up(self, worker: int, reason: str) -> None:
        """Wait no longer for what a worker is at."""
        for fate in self._calls[worker]:
            fate.end(reason)

    async def _is_ready(self, place: Place) -> bool:
        """Tell whether an upstream says that it is ready.

        Raises:
            Unreachable: if it says nothing.
        """
        return await place.upstream.is_ready(self.model, PROBE_TIMEOUT)

    async def replace(self, worker: int) -> None:
        """Return when an upstream is ready; it is at nothing then.

        Raises:
            Unreachable: if it is not.
            NotProtocol: if it has the model no longer, or another one.
        """
        if self.places[worker].up:  # not found out here, but by others
            self._set_aside(self.places[worker], "it failed, or was silent for too long")
        self._give_up(worker, self._why(worker))
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
            if not await self._is_ready(place):
                raise Unreachable("it is not ready")
            if not place.up:
                await self.agreement.check(place, PROBE_TIMEOUT)
        except (Unreachable, NotProtocol) as error:
            self._set_aside(place, str(error))
            kind = NotProtocol if isinstance(error, NotProtocol) else Unreachable
            raise kind(f"{place.upstream.url}: {error}") from error
        if not place.up and place is self.places[place.worker]:
            place.up = place.on_probation = True
            place.silent = 0  # its failures stay: that it is ready is no sign against others
            place.answered = time.monotonic()
            self.metrics.up.labels(place.upstream.url).set(1)
            log_event("upstream is back", **self._told(place))

    async def _watch_all(self) -> None:
        pause = PROBE_PERIOD
        while True:
            await asyncio.sleep(pause)
            up = [place for place in self.places if place.up]
            groups = [up[first : first + AT_ONCE] for first in range(0, len(up), AT_ONCE)]
            delays = [SPREAD * PROBE_PERIOD * i / len(groups) for i in range(len(groups))]
            pause = PROBE_PERIOD - max(delays, default=0.0)
            looks = (self._look_at(*each, pause) for each in zip(groups, delays, strict=True))
            await asyncio.gather(*looks)

    async def _look_at(self, group: Sequence[Place], delay: float, pause: float) -> None:
        """After a delay, look at those upstreams that have not answered for so many seconds."""
        await asyncio.sleep(delay)
        now = time.monotonic()
        quiet = [place for place in group if place.up and now - place.answered > pause]
        looks = await asyncio.gather(*map(self._look, quiet), return_exceptions=True)
        for error in looks:  # the others are looked at all the same
            if error is not None:
                log_error(error)

    async def _look(self, place: Place) -> None:
        """Ask an upstream that has not answered for a while whether it is ready."""
        try:
            ready = await self._is_ready(place)
            reason = "it is not ready"
        except NoFiles:
            return
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
            Unreachable: if none answers, or has answered since the start; or see `Versions`.
        """
        if version:
            return await self.versions.metadata(version)
        if not self.agreement.metadata:
            raise Unreachable("no upstream has been up yet")
        return self.agreement.metadata

    async def _metadata(self, version: str) -> Mapping[str, Any]:
        """Ask upstreams for a version's metadata, one after the other.

        Raises:
            NotProtocol: if the first that answers has none.
            Unreachable: if none answers.
        """
        reason = "no upstream is up"
        for place in self.places:
            if place.up:
                try:
                    return await place.upstream.metadata(self.model, version, START_TIMEOUT)
                except Unreachable as error:
                    reason = str(error)
        raise Unreachable(reason)

    async def close(self) -> None:
        """Look at upstreams no more."""
        await self._background.stop()
        await self.versions.close()
        probes = [place.probe for place in self.places if place.probe is not None]
        for probe in probes:
            probe.cancel()
        await asyncio.gather(*probes, return_exceptions=True)
