"""What stands in front of every request: the name it came by, the page it came from, the token."""

from __future__ import annotations

import asyncio
import hmac
import ipaddress
import logging
import re
from collections.abc import Sequence
from pathlib import Path

from codedinvnet.common.errors import UserError
from codedinvnet.net.admin_client import read_token
from codedinvnet.net.answers import Reply, error_reply
from codedinvnet.net.background import in_thread
from codedinvnet.net.http1 import RequestHead
from codedinvnet.net.listening import LOOPBACK
from codedinvnet.net.logs import Lasting, log_event

PERIOD = 1.0
"""Seconds between two looks whether a token's file has another."""
ANY_ADDRESS = ("0.0.0.0", "::")
"""Hosts to listen on that mean every address of this machine."""
ANY = "*"
"""Allows any name."""
STRANGE_PAGE = "a page of another site may not do this"
NEEDED = "a bearer token is needed: Authorization: Bearer TOKEN"
MOST_FOUND, LONG_HOST = 64, 256
"""Host fields that are remembered, and their bytes: with "*" clients choose them."""
_port = re.compile(r":\d*$")


class Token:
    """A token in a file, which is read again when it changes.

    Args:
        path: the file; None: there is no token.
        flag: the option that names it, for messages.

    Attributes:
        text: the token; "" without one.

    Raises:
        UserError: if the file holds none.
    """

    def __init__(self, path: Path | None, flag: str = "--token-file") -> None:
        self.path, self.flag, self.text = path, flag, read_token(path, flag)
        self._kept = Lasting()

    async def look(self) -> None:
        """Take the file's token, if there is a file and it holds one."""
        path, flag = self.path, self.flag
        if path is None:
            return
        try:
            text = await in_thread(lambda: read_token(path, flag))
        except UserError as error:
            self._kept.log("the old token is kept", logging.WARNING, reason=str(error))
            return
        self._kept.end()
        if text != self.text:
            self.text = text
            log_event("token changed", option=flag)

    async def follow(self) -> None:
        """Look at the file again and again, for ever."""
        while True:
            await asyncio.sleep(PERIOD)
            await self.look()


class Guard:
    """Lets requests through whose Host header is known and that carry the token.

    The browser takes a page of another site that has its name lead here (DNS rebinding) for ours,
    and lets it read what it asks for; but it says by what name it came.

    Args:
        hosts: names of this server besides the machine's own for itself: what it listens on, and
            what the operator allows. "*" is any name, 0.0.0.0 and :: are any address.
        token: that clients must send.
        is_guarded: whether a token is needed, or only this machine reaches the port.
    """

    def __init__(self, hosts: Sequence[str], token: Token, is_guarded: bool = True) -> None:
        self.token = token
        self.allow(hosts, is_guarded)

    def allow(self, hosts: Sequence[str], is_guarded: bool) -> None:
        """Know these names from now on; see the class for the arguments."""
        self.is_guarded = is_guarded
        self._given = {host.lower().strip("[]") for host in hosts}
        self._names = self._given.union(LOOPBACK)
        self._found: set[bytes] = set()
        """Host fields that are known, as clients wrote them."""

    def refusal(self, head: RequestHead, is_open: bool) -> Reply | None:
        """Return why a request is refused before its body is read; None if it is not.

        Args:
            head: of the request.
            is_open: whether its path needs no token.
        """
        host = head.known.get(b"host")
        if host is not None and host not in self._found:
            name = host.decode("latin-1")
            if not self.knows(name):
                return error_reply(421, f"host {name[:100]!r} is not known here; see allow-host")
            if len(self._found) < MOST_FOUND and len(host) < LONG_HOST:
                self._found.add(host)
        if not is_open and not self.trusts(head):
            return error_reply(401, NEEDED)
        return None

    def refusal_of_change(self, head: RequestHead) -> Reply | None:
        """Return why a request may not change this server; None if it may.

        Only a page of this server's own may have a browser send one.
        """
        if not self.is_guarded:
            why = "any client that reaches the port could do this: it needs --token-file"
            return error_reply(403, why)
        if not self.is_own_page(head):
            return error_reply(403, STRANGE_PAGE)
        kind = head.known.get(b"content-type", b"").partition(b";")[0].strip()
        if kind != b"application/json":  # other pages' forms can only send other types
            return error_reply(415, "the content type must be application/json")
        return None

    def is_right(self, authorization: bytes) -> bool:
        """Return whether a request carries the token, if one is needed."""
        if not self.token.text:
            return True
        scheme, _, token = authorization.partition(b" ")
        right = hmac.compare_digest(token.strip(), self.token.text.encode())
        return scheme.lower() == b"bearer" and right

    def trusts(self, head: RequestHead) -> bool:
        """Return whether a request shows that its client has the token, if there is one."""
        return self.is_right(head.known.get(b"authorization", b""))

    def knows(self, host: str) -> bool:
        """Return whether a Host header, with or without a port, names this server."""
        name = host.lower()
        if name in self._names or ANY in self._names:
            return True
        name = _without_port(name)
        if name in self._names:
            return True
        if self._names.isdisjoint(ANY_ADDRESS):
            return False
        try:  # an address cannot be made to lead elsewhere
            ipaddress.ip_address(name)
        except ValueError:
            return False
        return True

    def is_own_page(self, head: RequestHead) -> bool:
        """Return whether a request comes from no page of another site.

        A page is ours if it is of the host that the request names, or of one allowed here.
        """
        known = head.known
        if b"origin" not in known:
            return True
        name = known[b"origin"].decode("latin-1").lower().partition("://")[2]
        host = known.get(b"host", b"").decode("latin-1").lower()
        return bool(name) and (name == host or _without_port(name) in self._given)


def _without_port(name: str) -> str:
    name = _port.sub("", name)
    return name[1:-1] if name.startswith("[") and name.endswith("]") else name
