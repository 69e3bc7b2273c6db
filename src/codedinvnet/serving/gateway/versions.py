"""What upstreams say of a model's versions, which clients may ask for without a token."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Awaitable, Callable, Collection, Mapping
from typing import Any

from codedinvnet.serving.answers import BadRequest
from codedinvnet.serving.faces.v2 import short
from codedinvnet.serving.gateway.calls import NotProtocol, Unreachable

KEPT = 1.0
"""Seconds for which an answer stands."""
MOST = 16
"""Other versions than those that upstreams name are asked for within that time, at most."""
LONGEST_VERSION = 256
"""Characters of a version's name."""
PARENTS, SEPARATORS = frozenset({".", ".."}), frozenset("/\\")
"""What leads to another path than the model's, at a server or proxy that resolves paths."""
Answer = Mapping[str, Any] | NotProtocol | Unreachable


def check_version(version: str) -> None:
    """Refuse what is no version's name before an upstream is asked for it.

    Raises:
        BadRequest: if it is long, or could lead to another path than the model's.
    """
    if len(version) > LONGEST_VERSION:
        raise BadRequest(f"version {short(version)}: more than {LONGEST_VERSION} characters")
    if version in PARENTS or not SEPARATORS.isdisjoint(version):
        raise BadRequest(f"version {short(version)}: it is a path")


class Question:
    """One question, for whoever asks it meanwhile.

    Args:
        answer: what upstreams are asked.

    Attributes:
        until: when somebody is to ask again; without an answer nobody is.
    """

    def __init__(self, answer: asyncio.Task[Answer]) -> None:
        self.answer, self.until = answer, math.inf
        answer.add_done_callback(self._answered)

    def _answered(self, _: asyncio.Task[Answer]) -> None:
        self.until = asyncio.get_running_loop().time() + KEPT


class Versions:
    """Asks for a version's metadata once for many clients, and for few versions at a time.

    Args:
        ask: asks upstreams for it.
        named: returns the versions that upstreams name.
    """

    def __init__(
        self,
        ask: Callable[[str], Awaitable[Mapping[str, Any]]],
        named: Callable[[], Collection[str]],
    ) -> None:
        self._ask, self._named = ask, named
        self._questions: dict[str, Question] = {}

    async def metadata(self, version: str) -> Mapping[str, Any]:
        """Return a version's metadata, as of a second ago at most.

        Raises:
            NotProtocol: if there is no such version.
            Unreachable: if nobody answers, or too many other versions are asked for.
        """
        loop = asyncio.get_running_loop()
        now = loop.time()
        self._questions = {v: found for v, found in self._questions.items() if now < found.until}
        question = self._questions.get(version)
        if question is None:
            named = self._named()
            if version not in named and sum(v not in named for v in self._questions) >= MOST:
                raise Unreachable("too many versions are asked for: try again later")
            question = Question(loop.create_task(self._answer(version)))
            self._questions[version] = question
        found = await asyncio.shield(question.answer)
        if isinstance(found, Exception):
            raise type(found)(str(found))
        return found

    async def _answer(self, version: str) -> Answer:
        try:
            return await self._ask(version)
        except NotProtocol as error:
            return error
        except Unreachable as error:
            return Unreachable(str(error))

    async def close(self) -> None:
        """Ask no more."""
        asked = [question.answer for question in self._questions.values()]
        for answer in asked:
            answer.cancel()
        await asyncio.gather(*asked, return_exceptions=True)
