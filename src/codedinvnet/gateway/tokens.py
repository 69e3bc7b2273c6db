"""The tokens that clients must send, and that upstreams get."""

from __future__ import annotations

import asyncio
import hmac
import logging
from pathlib import Path

from codedinvnet.common.errors import UserError
from codedinvnet.net.admin_client import read_token
from codedinvnet.net.answers import Reply, error_reply
from codedinvnet.net.background import in_thread
from codedinvnet.net.http1 import RequestHead
from codedinvnet.net.logs import Lasting

PERIOD = 1.0
"""Seconds between two looks whether the file has another token."""
FLAG = "--upstream-token-file"


class UpstreamToken:
    """The gateway's own authorization at upstreams, in place of clients'.

    Args:
        path: the file with the token; None: upstreams get none.

    Attributes:
        field: the header field, as it is sent; empty without a token.

    Raises:
        UserError: if the file has none.
    """

    def __init__(self, path: Path | None) -> None:
        self.path, self.field = path, b""
        if path is not None:
            self._take(read_token(path, FLAG))

    def _take(self, token: str) -> None:
        self.field = b"Authorization: Bearer %b\r\n" % token.encode()

    async def follow(self) -> None:
        """Take another token once the file has one, for ever."""
        kept, path = Lasting(), self.path
        while path is not None:
            await asyncio.sleep(PERIOD)
            try:
                self._take(await in_thread(lambda: read_token(path, FLAG)))
                kept.end()
            except UserError as error:
                kept.log("the old token is kept", logging.WARNING, reason=str(error))


class ClientToken:
    """What clients must send; nothing if the token is ""."""

    def __init__(self, token: str) -> None:
        self._expected = token.encode()

    @property
    def is_needed(self) -> bool:
        """Whether there is one."""
        return bool(self._expected)

    def is_right(self, authorization: bytes) -> bool:
        """Tell whether a request may be answered."""
        if not self._expected:
            return True
        scheme, _, token = authorization.partition(b" ")
        right = hmac.compare_digest(token.strip(), self._expected)
        return scheme.lower() == b"bearer" and right

    def refusal(self, head: RequestHead) -> Reply | None:
        """Return why a request over HTTP is refused; None if it is not."""
        if not self._expected or self.is_right(head.known.get(b"authorization", b"")):
            return None
        return error_reply(401, "a bearer token is needed: Authorization: Bearer TOKEN")
