"""The model that upstreams have: what they say of it, and whether they say the same."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from typing import Any

from codedinvnet.errors import UserError
from codedinvnet.serving.gateway.calls import NotProtocol, Unreachable
from codedinvnet.serving.gateway.places import Place
from codedinvnet.serving.gateway.upstream_metrics import UpstreamMetrics
from codedinvnet.serving.gateway.upstreams import Upstream, difference
from codedinvnet.serving.logs import log_event

START_TIMEOUT = 5.0
"""Seconds for an answer about the model."""


class Agreement:
    """What upstreams say of their model.

    Args:
        model: its name.
        metrics: tell whose model is another one than the small backup stands for.
        differs: see `Roster`.
        others: returns all places but one.
        follows: whether another model is taken for the right one, once no upstream has that of
            before any more, as after a rolling update.

    Attributes:
        metadata: the model's, on which upstreams agree; empty before the first said so.
    """

    def __init__(
        self,
        model: str,
        metrics: UpstreamMetrics,
        differs: Callable[[Upstream], Awaitable[str]] | None,
        others: Callable[[Place], Iterable[Place]],
        follows: bool,
    ) -> None:
        self.model, self.metrics, self._differs = model, metrics, differs
        self._others, self._follows = others, follows
        self.metadata: Mapping[str, Any] = {}
        self._first = ""
        """An upstream that says so."""

    async def begin(self, places: Sequence[Place], waits: bool) -> list[tuple[Place, str]]:
        """Ask all for the model, and return who is not to be asked yet, and why.

        That of most upstreams is the right one, or the first of as many.

        Args:
            places: of the upstreams.
            waits: whether others may come, if none of them has the model.

        Raises:
            UserError: if none has the model; or, where it is to stay the same, if one has it not.
        """
        asked = [place.upstream.metadata(self.model, "", START_TIMEOUT) for place in places]
        found = await asyncio.gather(*asked, return_exceptions=True)
        said = {}
        silent: dict[str, tuple[Place, str]] = {}
        wrong: dict[str, tuple[Place, str]] = {}
        for place, answer in zip(places, found, strict=True):
            url = place.upstream.url
            if isinstance(answer, Unreachable):
                silent[url] = (place, str(answer))
            elif isinstance(answer, NotProtocol):
                wrong[url] = (place, f"{url}: {answer}")
            elif isinstance(answer, BaseException):
                raise answer
            else:
                said[url] = (place, answer)
        votes = {
            url: sum(not difference(mine, other) for _, other in said.values())
            for url, (_, mine) in said.items()
        }
        if votes:
            self._first = max(votes, key=votes.__getitem__)
            self.metadata = said[self._first][1]
        for url, (place, answer) in said.items():
            told = self._compare(place, answer)
            place.agrees = not told
            if told:
                wrong[url] = (place, told)
        if wrong and not ((said or waits) and self._follows):
            raise UserError(f"--upstream: {next(iter(wrong.values()))[1]}")
        for place in places:
            if place.agrees:
                try:
                    await self._check(place)
                except Unreachable as error:
                    silent[place.upstream.url] = (place, str(error))
        return [*silent.values(), *wrong.values()]

    async def check(self, place: Place, seconds: float) -> None:
        """Ask an upstream that comes, or is back, for its model.

        Raises:
            Unreachable: if it does not answer.
            NotProtocol: if it has the model no longer, or another one.
        """
        try:
            metadata = await place.upstream.metadata(self.model, "", seconds)
        except NotProtocol:
            place.agrees = False
            raise
        told = self._compare(place, metadata)
        nobody_has_it = not any(other.agrees for other in self._others(place))
        if told and self._follows and nobody_has_it:
            log_event("upstreams have another model", logging.WARNING, reason=told)
            told = ""
        place.agrees = not told
        if told:
            if self._differs is not None:
                self._mark(place, told)
            raise NotProtocol(told)
        self.metadata, self._first = metadata, place.upstream.url
        await self._check(place)

    def _compare(self, place: Place, metadata: Mapping[str, Any]) -> str:
        """Say how an upstream's metadata differ from those of the others ("")."""
        told = difference(self.metadata, metadata) if self.metadata else ""
        both = f"{place.upstream.url} and {self._first} have different models"
        return f"{both}: {told}" if told else ""

    async def _check(self, place: Place) -> None:
        """Find out whether an upstream has the model that a small backup stands for.

        Raises:
            Unreachable: if it does not answer.
        """
        self._mark(place, "" if self._differs is None else await self._differs(place.upstream))

    def _mark(self, place: Place, told: str) -> None:
        """Keep whether an upstream has another model than the small backup stands for, and how."""
        if bool(told) != place.differs and not place.is_gone:
            place.differs = bool(told)
            url, event = place.upstream.url, "upstream has the protected model again"
            if told:
                event = "upstream has another model: the small backup does not answer"
            self.metrics.differs.labels(url).set(place.differs)
            log_event(event, logging.WARNING if told else logging.INFO, upstream=url, reason=told)
