"""What stands in front of every request: the host's name and the token."""

from __future__ import annotations

import hmac
import ipaddress
import re

from codedinvnet.net.http1 import RequestHead
from codedinvnet.net.protocol.messages import short
from codedinvnet.serving.api.errors import HttpError, Unauthenticated
from codedinvnet.serving.config import LOOPBACK

ANY_ADDRESS = ("0.0.0.0", "::")
"""Hosts to listen on that mean every address of this machine."""
OPEN = re.compile(r"/|/v2/health/(live|ready)|/v2/models/[^/]+(/versions/[^/]+)?/ready")
"""Paths that need no token: those of probes, and the bare page."""


class Guard:
    """Lets requests through whose Host header is known and that carry the token.

    A page of another site that has its name lead here (DNS rebinding) would be taken for ours by
    the browser, and read what the service shows; but the browser says by what name it came. `hosts`
    are names in addition to this machine's own for itself; "*" is any. Where neither a token is
    needed nor only this machine reaches the port, `is_guarded` is false.
    """

    def __init__(self, hosts: tuple[str, ...], token: str, is_guarded: bool = True) -> None:
        self.names = {*LOOPBACK, *(host.lower().strip("[]") for host in hosts)}
        self.token, self.is_guarded = token.encode(), is_guarded

    def check(self, head: RequestHead) -> None:
        """Refuse a request over HTTP.

        Raises:
            HttpError: if its host is not known.
            Unauthenticated: if it needs a token.
        """
        host = head.known.get(b"host")
        if host is not None and not self.knows(host.decode("latin-1")):
            name = short(host.decode("latin-1"))
            raise HttpError(421, f"host {name} is not known here; see allowed-host")
        if self.token and not OPEN.fullmatch(head.path):
            self.check_token(head.known.get(b"authorization", b""))

    def check_token(self, given: bytes) -> None:
        """Refuse a request whose Authorization does not carry the token.

        Raises:
            Unauthenticated: if it does not.
        """
        scheme, _, token = given.partition(b" ")
        right = hmac.compare_digest(token.strip(), self.token)
        if self.token and (scheme.lower() != b"bearer" or not right):
            raise Unauthenticated("a bearer token is needed: Authorization: Bearer TOKEN")

    def knows(self, host: str) -> bool:
        """Tell whether a Host header, with or without a port, names this service."""
        name = host.lower()
        if name in self.names:
            return True
        name = re.sub(r":\d*$", "", name)
        if name.startswith("[") and name.endswith("]"):
            name = name[1:-1]
        if name in self.names or "*" in self.names:
            return True
        if self.names.isdisjoint(ANY_ADDRESS):
            return False
        try:  # an address cannot be made to lead elsewhere
            ipaddress.ip_address(name)
        except ValueError:
            return False
        return True
