"""The token that a gateway shows its upstreams, read anew when its file changes."""

from __future__ import annotations

import asyncio
import logging
from pathlib import Path

from codedinvnet.asking import read_token
from codedinvnet.errors import UserError
from codedinvnet.serving.gateway.upstreams import OwnHeaders
from codedinvnet.serving.logs import Lasting, log_event

FLAG = "--upstream-token-file"
PERIOD = 1.0
"""Seconds between two looks at the file."""


class UpstreamToken:
    """A bearer token as headers of all that upstreams are asked.

    Args:
        path: the file; None: there is no token.

    Raises:
        UserError: if the file cannot be read or holds none.

    Attributes:
        own: the headers.
    """

    def __init__(self, path: Path | None) -> None:
        self.path, self._token, self.own = path, "", OwnHeaders(flag=FLAG)
        self.look()

    def look(self) -> bool:
        """Take the token that the file has now; return whether it is another one.

        Raises:
            UserError: if there is none; that of before is kept.
        """
        token = read_token(self.path, FLAG)
        if token == self._token:
            return False
        self._token = token
        self.own.headers = (("authorization", f"Bearer {token}"),)
        return True

    async def follow(self) -> None:
        """Look again and again, for ever. A token that is short-lived is written anew in time."""
        kept = Lasting()
        while True:
            await asyncio.sleep(PERIOD)
            try:
                if self.look():
                    log_event("upstreams' token renewed", file=str(self.path))
                kept.end()
            except UserError as error:
                kept.log("upstreams' token is kept", logging.WARNING, reason=str(error))
