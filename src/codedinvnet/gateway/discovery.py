"""Which upstreams there are: those given, those in a file, and the addresses of names.

Files and names are read again every second, off the event loop. What a file says is taken once two
looks agree.
"""

from __future__ import annotations

import asyncio
import errno
import logging
import re
import stat
from collections.abc import Sequence
from pathlib import Path

from codedinvnet.common.errors import UserError, described
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


class Discovery:
    """Finds the upstreams' URLs.

    Args:
        given: on the command line.
        file: has others, one a line; None: there is none.
        resolver: finds the addresses of names.
        kind: of the URLs, "http" or "grpc".
    """

    def __init__(
        self, given: Sequence[str], file: Path | None, resolver: Resolver, kind: str = "http"
    ) -> None:
        self.given, self.file, self.resolver, self.kind = given, file, resolver, kind
        self._last: dict[str, list[str]] = {}
        """What each name was resolved to last."""
        self._taken = ""
        self._seen: str | None = None
        """The file as it was taken, and as it was at the last look."""

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
            origin = parse_origin(url.removeprefix(DNS), kind=self.kind)
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
                end = f"#{origin.name}" if origin.is_secure else ""
                self._last[url] = [
                    f"{origin.scheme}://{f'[{host}]' if ':' in host else host}:{origin.port}"
                    f"{origin.path}{end}"
                    for host in hosts
                ]
            found += self._last.get(url, [])
        if not found and not lacking and self.file is not None:
            lacking.append(f"--upstreams-file: {self.file} names no upstream")
        return list(dict.fromkeys(found)), "; ".join(lacking)

    async def _of_file(self) -> list[str]:
        if self.file is None:
            return []
        file = self.file

        def read() -> str:
            if not stat.S_ISREG(file.stat().st_mode):  # reading a FIFO or a device may never end
                raise OSError(errno.EINVAL, "not a regular file")
            return file.read_text()

        try:
            text = await apart(read, f"reading {file}")  # a file system that hangs stops nothing
        except (OSError, UnicodeDecodeError) as error:
            reason = error.strerror if isinstance(error, OSError) else error
            raise UserError(f"--upstreams-file: cannot read {file}: {reason}") from error
        if self._seen in (None, text):  # otherwise somebody may be writing it
            self._taken = text
        self._seen = text
        lines = (COMMENT.sub("", line).strip() for line in self._taken.splitlines())
        return [line for line in lines if line]


async def follow(discovery: Discovery, cluster: Cluster) -> None:
    """Keep a cluster's upstreams up to date, for ever; those that cannot be looked up are kept."""
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
