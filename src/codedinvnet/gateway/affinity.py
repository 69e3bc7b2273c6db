"""Which upstream has cached the beginning of a request: sessions, and prefixes of prompts."""

from __future__ import annotations

import re
import zlib
from collections.abc import Sequence
from http.cookies import CookieError, SimpleCookie

from codedinvnet.common.errors import UserError
from codedinvnet.net.http1 import RequestHead
from codedinvnet.net.requests import beginning
from codedinvnet.scheduler.caches import Prompt

BLOCK = 256
"""Bytes of a block: about 64 tokens. What is behind the last whole one is computed again."""
MOST_READ = 1 << 21
"""Bytes of a body that are looked at. Of longer prompts, the beginning is what may be cached."""
PREFIX = "prefix"
TEXTS = re.compile(rb'"(?:messages|prompt|input|instructions|system|tools)"\s*:')
"""Where the prompt begins in a body of OpenAI's or Anthropic's API."""
MODEL = re.compile(rb'"model"\s*:\s*"([^"\\]{1,200})"')
NAME = re.compile(r"[!#$%&'*+\-.^_`|~0-9A-Za-z]+")
FIELD = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")


class Affinity:
    """Finds what requests begin with.

    Args:
        how: `prefix`: what the prompt begins with; `cookie:NAME`; `body:NAME`: a string at the top
            of a JSON body, such as `prompt_cache_key`; else the name of a header with a session.

        what: names it in errors.

    Raises:
        UserError: if it is none of these.
    """

    def __init__(self, how: str, what: str = "--affinity") -> None:
        kind, _, name = how.rpartition(":")
        self._cookie = name if kind == "cookie" else ""
        self._field: re.Pattern[bytes] | None = None
        self._header = b""
        if how == PREFIX:
            return
        if kind == "body" and FIELD.fullmatch(name):
            self._field = re.compile(rb'"%b"\s*:\s*"([^"\\]{1,200})"' % name.encode())
        elif not kind and NAME.fullmatch(name):
            self._header = name.lower().encode()
        elif kind != "cookie" or not NAME.fullmatch(name):
            raise UserError(
                f"{what}: must be prefix, a header such as x-session, cookie:NAME or body:FIELD, "
                f"got {how!r}"
            )

    def prompt(self, head: RequestHead, body: Sequence[bytes]) -> Prompt | None:
        """Return what a request begins with; None if it is of no session and has no prompt."""
        size = sum(map(len, body))
        if not size:
            return None
        if self._header:
            session = head.known.get(self._header, b"")
        elif self._cookie:
            session = _cookie(head.known.get(b"cookie", b""), self._cookie)
        elif self._field is not None:
            found = self._field.search(_read(body))
            session = b"" if found is None else found[1]
        else:
            return _prefix(_read(body), size)
        return Prompt(((zlib.crc32(session), size),), size) if session else None


def _read(body: Sequence[bytes]) -> bytes:
    return b"".join(beginning(body, MOST_READ))


def _prefix(text: bytes, size: int) -> Prompt | None:
    """Return a key for each beginning of whole blocks of the prompt in a body."""
    found, model = TEXTS.search(text), MODEL.search(text)
    if found is None:
        return None
    begin = found.end()
    key, keys = zlib.crc32(b"" if model is None else model[1]), []
    for at in range(begin, len(text) - BLOCK + 1, BLOCK):
        key = zlib.crc32(text[at : at + BLOCK], key)
        keys.append((key, at + BLOCK - begin))
    return Prompt(tuple(keys), size - begin) if keys else None


def _cookie(text: bytes, name: str) -> bytes:
    try:
        found = SimpleCookie(text.decode("latin-1")).get(name)
    except CookieError:
        return b""
    return b"" if found is None else found.value.encode()
