"""The model that all upstreams have: what they say of it, and whether they say the same."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Mapping, Sequence
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
        differs: see `UpstreamPool`.

    Attributes:
        metadata: the model's, on which all upstreams agree; empty before the first said so.
    """

    def __init__(
        self,
        model: str,
        metrics: UpstreamMetrics,
        differs: Callable[[Upstream], Awaitable[str]] | None,
    ) -> None:
        self.model, self.metrics, self._differs = model, metrics, differs
        self.metadata: Mapping[str, Any] = {}
        self._first = ""
        """The upstream that said so first."""

    async def begin(self, places: Sequence[Place]) -> list[tuple[Place, str]]:
        """Ask all for the model, and return who did not answer, and why.

        Raises:
            UserError: if one does not have the model, or theirs differ.
        """
        asked = [place.upstream.metadata(self.model, "", START_TIMEOUT) for place in places]
        found = await asyncio.gather(*asked, return_exceptions=True)
        silent = {}
        for place, answer in zip(places, found, strict=True):
            if isinstance(answer, Unreachable):
                silent[place.upstream.url] = (place, str(answer))
            elif isinstance(answer, NotProtocol):
                raise UserError(f"--upstream: {place.upstream.url}: {answer}")
            elif isinstance(answer, BaseException):
                raise answer
            elif told := self._compare(place, answer):
                raise UserError(f"--upstream: {told}")
        for place in places:
            if place.upstream.url not in silent:
                try:
                    await self._check(place)
                except Unreachable as error:
                    silent[place.upstream.url] = (place, str(error))
        return list(silent.values())

    async def check(self, place: Place, seconds: float) -> None:
        """Ask an upstream that comes, or is back, for its model.

        Raises:
            Unreachable: if it does not answer.
            NotProtocol: if it has the model no longer, or another one.
        """
        metadata = await place.upstream.metadata(self.model, "", seconds)
        if told := self._compare(place, metadata):
            raise NotProtocol(told)
        await self._check(place)

    def _compare(self, place: Place, metadata: Mapping[str, Any]) -> str:
        """Take an upstream's metadata for the model's, or say how they differ from others' ("")."""
        if not self.metadata:
            self.metadata, self._first = metadata, place.upstream.url
        told = difference(self.metadata, metadata)
        both = f"{place.upstream.url} and {self._first} have different models"
        return f"{both}: {told}" if told else ""

    async def _check(self, place: Place) -> None:
        """Find out whether an upstream has the model that a small backup stands for.

        Raises:
            Unreachable: if it does not answer.
        """
        told = "" if self._differs is None else await self._differs(place.upstream)
        if bool(told) != place.differs and not place.is_gone:
            place.differs = bool(told)
            url, event = place.upstream.url, "upstream has the protected model again"
            if told:
                event = "upstream has another model: the small backup does not answer"
            self.metrics.differs.labels(url).set(place.differs)
            log_event(event, logging.WARNING if told else logging.INFO, upstream=url, reason=told)
