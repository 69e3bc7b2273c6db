"""Which upstreams there are: those given, those in a file, and those that a name has for addresses.

Files and names are looked at again while the gateway runs.
"""

from __future__ import annotations

import asyncio
import logging
import re
import socket
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from urllib.parse import urlsplit

from codedinvnet.errors import UserError, is_host
from codedinvnet.models.upstream import check_server
from codedinvnet.serving.answers import described
from codedinvnet.serving.gateway.pool import UpstreamPool
from codedinvnet.serving.gateway.upstreams import SCHEMES, SECURE, Upstream
from codedinvnet.serving.logs import Lasting

COMMENT = re.compile(r"(^|\s)#.*")
"""What a file of upstreams may say beside them."""
DNS = "dns+"
"""Before a URL: each address of its name is an upstream."""
PERIOD = 1.0
"""Seconds between two looks."""


class NoneYet(UserError):
    """There is no upstream, but one may come."""


Resolve = Callable[[str, int], Awaitable[list[str]]]


async def addresses(host: str, port: int) -> list[str]:
    """Return the addresses of a name, of the family of the first one: a server may have both.

    Raises:
        OSError: if it has none.
    """
    loop = asyncio.get_running_loop()
    found = await loop.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    family = found[0][0]
    return [str(address[4][0]) for address in found if address[0] == family]


class Discovery:
    """Finds the upstreams' URLs.

    Args:
        given: on the command line.
        file: has others, one a line; None: there is none.
        resolve: returns the addresses of a name and a port.
    """

    def __init__(
        self, given: Sequence[str], file: Path | None = None, resolve: Resolve = addresses
    ) -> None:
        self.given, self.file, self.resolve = given, file, resolve
        self._last: dict[str, list[str]] = {}
        """What each name was resolved to last."""

    @property
    def changes(self) -> bool:
        """Whether there may be other upstreams later."""
        return self.file is not None or any(url.startswith(DNS) for url in self.given)

    async def urls(self) -> tuple[list[str], str]:
        """Return the upstreams of now, each once, and why some or all are not there ("").

        A name that has no address now has those that it had last.

        Raises:
            UserError: if nobody can tell.
        """
        found: list[str] = []
        lacking: list[str] = []
        for url in (*self.given, *self._of_file()):
            if not url.startswith(DNS):
                found.append(url)
                continue
            try:
                self._last[url] = await self._resolved(url)
            except NoneYet as error:
                lacking.append(str(error))
            found += self._last.get(url, [])
        if not found and not lacking:
            lacking.append(f"--upstreams-file: {self.file} has no upstream")
        return list(dict.fromkeys(found)), "; ".join(lacking)

    def _of_file(self) -> list[str]:
        if self.file is None:
            return []
        try:
            lines = self.file.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            reason = error.strerror if isinstance(error, OSError) else error
            raise UserError(f"--upstreams-file: cannot read {self.file}: {reason}") from error
        stripped = (COMMENT.sub("", line).strip() for line in lines)  # a URL may have a fragment
        return [line for line in stripped if line]

    async def _resolved(self, url: str) -> list[str]:
        try:
            parts = urlsplit(url.removeprefix(DNS))
            port = parts.port or SCHEMES.get(parts.scheme)
        except ValueError as error:
            raise UserError(f"--upstream: {url!r} is no URL: {error}") from error
        if parts.scheme not in SCHEMES or parts.hostname is None or port is None:
            known = ", ".join(f"{DNS}{scheme}://NAME:PORT" for scheme in SCHEMES)
            raise UserError(f"--upstream: {url!r} is not one of {known}")
        for name in filter(None, (parts.hostname, parts.fragment)):
            if not is_host(name):
                raise UserError(f"--upstream: {url!r} is no URL: {name!r} is no host's name")
        check_server(url, "--upstream")
        try:
            found = await self.resolve(parts.hostname, port)
        except OSError as error:
            told = f"--upstream: {parts.hostname} has no address: {error.strerror}"
            raise NoneYet(told) from error
        hosts = [f"[{host}]" if ":" in host else host for host in found]
        certified = parts.fragment or parts.hostname  # addresses have no certificates
        end = f"#{certified}" if parts.scheme in SECURE else ""
        return [f"{parts.scheme}://{host}:{port}{parts.path}{end}" for host in hosts]


async def follow(
    discovery: Discovery, pool: UpstreamPool, open_one: Callable[[str], Upstream]
) -> None:
    """Give a pool the upstreams that there are, for ever; those of before if nobody can tell."""
    kept = Lasting()
    while True:
        await asyncio.sleep(PERIOD)
        try:
            urls, lacking = await discovery.urls()
            if lacking:
                kept.log("upstreams are kept", logging.WARNING, reason=lacking)
            if urls:
                pool.change(urls, open_one)
            if not lacking:
                kept.end()
        except UserError as error:
            kept.log("upstreams are kept", logging.WARNING, reason=str(error))
        except Exception as error:  # our own mistake, of which the next look may know nothing
            reason = described(error)
            kept.log("upstreams are kept", logging.ERROR, reason=reason, error=error)
