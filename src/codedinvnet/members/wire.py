"""What members tell one another, as bytes: the scheduler's events and actions, and a few more.

A frame is its length in four bytes, and as much JSON: a list of messages, each a list of its name
and its fields. Writing and reading a message takes about 10 µs.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple, get_args

from codedinvnet.common.errors import UserError
from codedinvnet.scheduler.actions import Action
from codedinvnet.scheduler.events import Event, Resumed, Submit

PROTOCOL = 1
FIRST, LONGEST = 1 << 16, 1 << 24
"""Bytes of a frame, at most: of one whose sender is not known yet, and of others."""


class Hello(NamedTuple):
    """A member presents itself."""

    version: str
    """Of the program and of this protocol."""
    digest: str
    """Of what all members must have in common: upstreams, routes, rules."""
    token: str
    name: int
    """Drawn at its start; queries and attempts that it numbers begin with it."""
    started: float
    """The older member decides."""
    decides: bool
    now: float
    """Its clock."""
    upstreams: tuple[str, ...]
    """The URL at each place, "" where there is none."""


class Decides(NamedTuple):
    """Whether the sender has a scheduler of its own, from now on."""

    decides: bool


class Upstreams(NamedTuple):
    """The URL at each place of the scheduler, from now on."""

    urls: tuple[str, ...]


class Join(NamedTuple):
    """Decide for the sender from now on; what it has in flight follows."""

    down: tuple[int, ...]
    """The places that it finds down."""


class Suspect(NamedTuple):
    """Another member finds this place down."""

    place: int
    reason: str


class Ping(NamedTuple):
    """A sign of life, and of when."""

    at: float


class Pong(NamedTuple):
    """The answer to a `Ping`."""

    at: float


Own = Hello | Decides | Upstreams | Join | Suspect | Ping | Pong
Message = Own | Event | Action
KINDS: dict[str, Any] = {
    kind.__name__: kind for union in (Own, Event, Action) for kind in get_args(union)
}
_encoder = json.JSONEncoder(separators=(",", ":"))


class BadFrame(Exception):
    """Bytes that no member sends."""


def encode(messages: Iterable[Message]) -> bytes:
    """Return a frame with some messages."""
    body = _encoder.encode([(type(each).__name__, *each) for each in messages]).encode()
    return len(body).to_bytes(4, "big") + body


class Frames:
    """Puts frames together again from what a socket reads."""

    def __init__(self) -> None:
        self._read, self._longest = bytearray(), FIRST

    def trust(self) -> None:
        """Take long frames from now on."""
        self._longest = LONGEST

    def feed(self, data: bytes) -> Iterator[Message]:
        """Yield the messages of the frames that are complete.

        Raises:
            BadFrame: if it is none.
        """
        read = self._read
        read += data
        while len(read) >= 4:
            end = 4 + int.from_bytes(read[:4], "big")
            if end > self._longest:
                raise BadFrame("it is too long")
            if len(read) < end:
                return
            body = bytes(read[4:end])
            del read[:end]
            try:
                found = [_message(*each) for each in json.loads(body)]
            except (ValueError, KeyError, TypeError, RecursionError) as error:
                raise BadFrame(f"it has no messages: {error!r}") from error
            yield from found


def _message(name: str, *fields: Any) -> Message:
    kind = KINDS[name]
    if kind is Resumed:
        submit, attempts = fields
        return Resumed(Submit(*map(_frozen, submit)), _frozen(attempts))
    message: Message = kind(*map(_frozen, fields))
    return message


def _frozen(value: Any) -> Any:
    return tuple(map(_frozen, value)) if type(value) is list else value


def read_members(text: str) -> list[tuple[bool, str, int]]:
    """Return (whether each address of the name is one, host, port) of each of a list of members.

    Raises:
        UserError: naming the option.
    """
    found = []
    for each in filter(None, map(str.strip, text.split(","))):
        host, _, port = each.removeprefix("dns+").rpartition(":")
        if not host or not port.isdigit() or not 0 < int(port) < 65536:
            raise UserError(f"--members: {each!r} is not HOST:PORT or dns+NAME:PORT")
        found.append((each.startswith("dns+"), host.strip("[]"), int(port)))
    return found
