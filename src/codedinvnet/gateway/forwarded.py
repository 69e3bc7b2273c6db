"""What a proxy tells upstreams about a request: who sent it, by which way, and its number.

`Forwarded` is of RFC 7239; `X-Forwarded-For`, `-Proto` and `-Host` are what most servers read.
Anybody can send these fields, so what clients say is passed on only as far as the operator says
that proxies of his own stand in front (`--trusted-hops`).
"""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from functools import lru_cache

from codedinvnet.net.http1 import RequestHead

REQUEST_ID = b"x-request-id"
FIELDS = frozenset(
    {b"forwarded", b"x-forwarded-for", b"x-forwarded-proto", b"x-forwarded-host", REQUEST_ID}
)
"""Clients' fields that are replaced."""
_sound_id = re.compile(rb"[\x21-\x7e]{1,128}")
_sound_host = re.compile(rb"[A-Za-z0-9.:_\[\]-]{1,255}")


class Forwarding:
    """Writes the fields for one client's connection.

    Args:
        peer: the address that the connection comes from.
        secure: whether it is of TLS.
        hops: proxies of the operator's own between clients and this gateway.
    """

    def __init__(self, peer: str, secure: bool, hops: int) -> None:
        self.peer = peer.encode("ascii", "replace")
        self.proto = b"https" if secure else b"http"
        self.hops = hops
        self._node = b'"[%b]"' % self.peer if b":" in self.peer else self.peer
        self._of_host = (b"", self._fields([self.peer], self.proto, b"", []))
        """What was written last without proxies in front, and for which Host."""

    def client(self, head: RequestHead) -> bytes:
        """Return the address of the client, as the outermost trusted proxy saw it."""
        seen = self._last(head, b"x-forwarded-for") if self.hops else ()
        return seen[0] if seen else self.peer

    def write(self, head: RequestHead, identity: bytes) -> bytes:
        """Return the fields of a request, each with its line's end."""
        known = head.known
        host = known.get(b"host", b"")
        if not self.hops:
            if host != self._of_host[0]:
                sound = host if len(host) < 256 else b""
                self._of_host = (sound, self._fields([self.peer], self.proto, sound, []))
            fields = self._of_host[1]
        else:
            addresses = [*self._last(head, b"x-forwarded-for"), self.peer]
            proto = known.get(b"x-forwarded-proto", self.proto).lower()
            proto = proto if proto in (b"http", b"https") else self.proto
            host = known.get(b"x-forwarded-host", host)
            fields = self._fields(addresses, proto, host, self._last(head, b"forwarded"))
        return b"%bX-Request-Id: %b\r\n" % (fields, identity)

    def _fields(
        self, addresses: Sequence[bytes], proto: bytes, host: bytes, steps: Sequence[bytes]
    ) -> bytes:
        own = b"for=%b;proto=%b" % (self._node, proto)
        lines = [
            b"X-Forwarded-For: %b\r\nX-Forwarded-Proto: %b\r\n" % (b", ".join(addresses), proto)
        ]
        if _sound_host.fullmatch(host):
            own += b';host="%b"' % host
            lines.append(b"X-Forwarded-Host: %b\r\n" % host)
        lines.append(b"Forwarded: %b\r\n" % b", ".join([*steps, own]))
        return b"".join(lines)

    def _last(self, head: RequestHead, name: bytes) -> Sequence[bytes]:
        """Return what the trusted proxies in front added to a list: its last members."""
        said = head.known.get(name, b"")
        return [each.strip() for each in said.split(b",") if each.strip()][-self.hops :]


def request_id(head: RequestHead) -> bytes:
    """Return the number that a request came with, or a new one."""
    said = head.known.get(REQUEST_ID)
    if said is not None and _sound_id.fullmatch(said):
        return said
    return b"%032x" % random.getrandbits(128)


@lru_cache(4096)
def forwarding(peer: str, secure: bool, hops: int) -> Forwarding:
    """Return what writes the fields of a client's requests."""
    return Forwarding(peer, secure, hops)
