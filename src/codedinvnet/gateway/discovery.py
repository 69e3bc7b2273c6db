"""Which upstreams there are: those given, those in a file, and the addresses of names.

Files and names are read again every second, off the event loop and with a time limit.
"""

from __future__ import annotations

import asyncio
import logging
import os
import re
import stat
from collections.abc import Sequence
from pathlib import Path

from codedinvnet.errors import UserError, described
from codedinvnet.gateway.cluster import Cluster
from codedinvnet.net.background import apart
from codedinvnet.net.client import parse_origin
from codedinvnet.net.logs import Lasting
from codedinvnet.net.resolve import Resolver

COMMENT = re.compile(r"(^|\s)#.*")
DNS = "dns+"
"""Before a URL: each address of its name is an upstream."""
PERIOD = 1.0
"""Seconds between two looks."""
FILE_TIMEOUT = 2.0
"""Seconds in which a file must be read."""
MOST_FILE = 1 << 20
"""Bytes of it."""


class Discovery:
    """Finds the upstreams' URLs.

    Args:
        given: on the command line.
        file: has others, one a line; None: there is none.
        resolver: finds the addresses of names.
    """

    def __init__(self, given: Sequence[str], file: Path | None, resolver: Resolver) -> None:
        self.given, self.file, self.resolver = given, file, resolver
        self._last: dict[str, list[str]] = {}
        """What each name was resolved to last."""
        self._reading: asyncio.Future[str] | None = None

    @property
    def changes(self) -> bool:
        """Whether there may be other upstreams later."""
        return self.file is not None or any(url.startswith(DNS) for url in self.given)

    async def urls(self) -> tuple[list[str], str]:
        """Return the upstreams of now, each once, and why some or all are lacking ("").

        A name that has no address now keeps those that it had last.

        Raises:
            UserError: if a URL is none, or the file cannot be read.
        """
        found: list[str] = []
        lacking: list[str] = []
        for url in (*self.given, *await self._of_file()):
            origin = parse_origin(url.removeprefix(DNS))
            if not url.startswith(DNS):
                found.append(url)
                continue
            try:
                addresses = await self.resolver.resolve(origin.host, origin.port)
            except OSError as error:
                reason = error.strerror or str(error)
                lacking.append(f"--upstream: {origin.host} has no address: {reason}")
            else:
                family = addresses[0][0]  # a server may have an address of each family
                hosts = [str(one[4][0]) for one in addresses if one[0] == family]
                end = f"#{origin.name}" if origin.scheme == "https" else ""
                self._last[url] = [
                    f"{origin.scheme}://{f'[{host}]' if ':' in host else host}:{origin.port}"
                    f"{origin.path}{end}"
                    for host in hosts
                ]
            found += self._last.get(url, [])
        if not found and not lacking:
            lacking.append(f"--upstreams-file: {self.file} names no upstream")
        return list(dict.fromkeys(found)), "; ".join(lacking)

    async def _of_file(self) -> list[str]:
        if self.file is None:
            return []
        if self._reading is None or self._reading.done():  # one that hangs is not joined by others
            file = self.file
            self._reading = apart(lambda: _read(file), f"reading {file}")
        try:
            text = await asyncio.wait_for(asyncio.shield(self._reading), FILE_TIMEOUT)
        except asyncio.TimeoutError:
            told = f"--upstreams-file: {self.file} was not read within {FILE_TIMEOUT:g} s"
            raise UserError(told) from None
        lines = (COMMENT.sub("", line).strip() for line in text.splitlines())
        return [line for line in lines if line]


def _read(path: Path) -> str:
    """Return a regular file's text; reading a pipe might never end."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
        try:
            if not stat.S_ISREG(os.fstat(descriptor).st_mode):
                raise UserError(f"--upstreams-file: {path} is not a regular file")
            return os.read(descriptor, MOST_FILE).decode()
        finally:
            os.close(descriptor)
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise UserError(f"--upstreams-file: cannot read {path}: {reason}") from error


async def follow(discovery: Discovery, cluster: Cluster) -> None:
    """Give a cluster the upstreams that there are, for ever; it keeps them if nobody can tell."""
    kept = Lasting()
    while True:
        await asyncio.sleep(PERIOD)
        try:
            urls, lacking = await discovery.urls()
            if lacking:
                kept.log("upstreams are kept", logging.WARNING, reason=lacking)
            if urls:
                cluster.change(urls)
            if not lacking:
                kept.end()
        except UserError as error:
            kept.log("upstreams are kept", logging.WARNING, reason=str(error))
        except Exception as error:  # our own mistake, of which the next look may know nothing
            reason = described(error)
            kept.log("upstreams are kept", logging.ERROR, reason=reason, error=error)
