"""The lines between members: TCP, with TLS if the gateway has a certificate, or Unix sockets."""

from __future__ import annotations

import asyncio
import hmac
import logging
import socket
import ssl
import stat
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TypeAlias, cast

from codedinvnet.common.errors import UserError, described
from codedinvnet.members.member import BEAT, Member
from codedinvnet.members.wire import BadFrame, Frames, Hello, Message, encode
from codedinvnet.net.background import Background
from codedinvnet.net.guard import Token
from codedinvnet.net.logs import Quiet, log_event
from codedinvnet.net.resolve import Resolver
from codedinvnet.net.tls import Certificate

Address: TypeAlias = tuple[str, int] | Path
LOOK = 0.1
"""Seconds between two looks for members that there is no line to."""
AGAIN, YOUNGER, SELF = 0.25, 5.0, 60.0
"""Seconds until an address is tried again: where no one was, where the member is younger and comes
here by itself, and where this one is."""
SOCKET = ".member"
"""What the names of members' sockets in a folder end with."""
DEEPEST = 90
"""Bytes of a folder's path: a socket's may have 107."""
GREETING = 2.0
"""Seconds for a connection and the other's hello."""


def own_folder(path: str | Path, what: str) -> Path:
    """Return a folder for members' sockets, which is made if it isn't there.

    Raises:
        UserError: if it cannot be made, is too deep, or if anybody may put a socket there.
    """
    folder = Path(path).absolute()
    if len(bytes(folder)) > DEEPEST:
        raise UserError(f"{what}: {folder}: choose a path of at most {DEEPEST} bytes")
    try:
        folder.mkdir(0o700, parents=True, exist_ok=True)
        mode = folder.stat().st_mode
    except OSError as error:
        raise UserError(f"{what}: {folder}: {error.strerror}") from error
    if mode & stat.S_IWOTH:
        raise UserError(f"{what}: {folder}: everybody may write there; choose a folder of your own")
    return folder


def bind_in(folder: Path, name: str) -> socket.socket:
    """Return a socket in a folder, which others see once it listens.

    Raises:
        OSError: if there can be none.
    """
    listener, hidden = socket.socket(socket.AF_UNIX), folder / f".{name}"
    try:
        listener.bind(str(hidden))
        listener.listen()
        hidden.rename(folder / f"{name}{SOCKET}")
    except BaseException:
        listener.close()
        raise
    return listener


class Links:
    """Keeps lines to all older members, and takes those of younger ones.

    Args:
        member: this one.
        members: (whether each address of the name is one, host, port) of each, or a folder in
            which each has a Unix socket.
        digest: of what all must have in common.
        version: of the program.
        token: that members show one another.
        resolver: finds the addresses of names.
        certificate: of this gateway; all members have the same. None: no TLS.

    Attributes:
        refused: address -> why the member there does not take part.
        strangers: logs what no member sends.
    """

    def __init__(
        self,
        member: Member,
        members: Sequence[tuple[bool, str, int] | Path],
        digest: str,
        version: str,
        token: Token,
        resolver: Resolver,
        certificate: Certificate | None = None,
    ) -> None:
        self.member, self.members, self.digest, self.version = member, members, digest, version
        self.token, self._resolver, self._certificate = token, resolver, certificate
        self.refused: dict[str, str] = {}
        self._next: dict[Address, float] = {}
        """When an address is tried again; infinite while there is a line."""
        self._lines: set[Line] = set()
        self._server: asyncio.Server | None = None
        self._background = Background()
        self._quiet, self.strangers = Quiet(), Quiet()

    async def start(self, listener: socket.socket) -> None:
        """Take lines on a socket, and open those to others."""
        loop = asyncio.get_running_loop()
        context = None
        if self._certificate is not None and listener.family != socket.AF_UNIX:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(self._certificate.chain, self._certificate.key)
        listen = (
            loop.create_unix_server if listener.family == socket.AF_UNIX else loop.create_server
        )
        self._server = await listen(lambda: Line(self, None), sock=listener, ssl=context)
        self._background.spawn(self._tick())
        self._background.spawn(self._look())

    async def stop(self) -> None:
        """Close all lines: others go on at once."""
        await self._background.stop()
        if self._server is not None:
            self._server.close()
        for each in self.members:
            if isinstance(each, Path):
                (each / f"{self.member.name:08x}{SOCKET}").unlink(missing_ok=True)
        for line in list(self._lines):
            line.close()

    async def _tick(self) -> None:
        while True:
            await asyncio.sleep(BEAT)
            self.member.tick(time.monotonic())

    async def _look(self) -> None:
        while True:
            for each in self.members:
                for address in await self._addresses(each):
                    if time.monotonic() >= self._next.get(address, 0.0):
                        self._next[address] = float("inf")
                        self._background.spawn(self._dial(address))
            await asyncio.sleep(LOOK)

    async def _addresses(self, member: tuple[bool, str, int] | Path) -> list[Address]:
        if isinstance(member, Path):
            return list(member.glob(f"*{SOCKET}"))
        is_several, host, port = member
        if not is_several:
            return [(host, port)]
        try:
            found = await self._resolver.resolve(host, port)
        except OSError as error:
            self._quiet.log("members are looked for", logging.WARNING, reason=described(error))
            return []
        return [(str(one[4][0]), port) for one in found]

    async def _dial(self, address: Address) -> None:
        loop, context = asyncio.get_running_loop(), None
        if self._certificate is not None and not isinstance(address, Path):
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
            context.check_hostname = False  # addresses come and go: the certificate is known
            context.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN
            context.load_verify_locations(self._certificate.chain)
        try:
            async with asyncio.timeout(GREETING):
                if isinstance(address, Path):
                    await loop.create_unix_connection(lambda: Line(self, address), str(address))
                else:
                    await loop.create_connection(lambda: Line(self, address), *address, ssl=context)
        except OSError as error:
            if isinstance(address, Path) and isinstance(error, ConnectionRefusedError):
                address.unlink(missing_ok=True)  # its process was killed
            if isinstance(error, ssl.SSLError):
                self.refuse(str(address), described(error))
            self._next[address] = time.monotonic() + AGAIN

    # What lines report

    def hello(self) -> Hello:
        """Return how this member presents itself."""
        now = time.monotonic()
        return self.member.hello(now, self.digest, self.version, self.token.text)

    def refuse(self, address: str, reason: str) -> None:
        """Log why a member does not take part, once."""
        if self.refused.get(address) != reason:
            self.refused[address] = reason
            log_event("a member is not joined", logging.WARNING, member=address, reason=reason)

    def opened(self, line: Line) -> None:
        """A connection is there."""
        self._lines.add(line)

    def greeted(self, line: Line, hello: Hello) -> None:
        """A member presents itself."""
        address, name = line.address, line.name
        if not hmac.compare_digest(hello.token, self.token.text):
            self.refuse(name, "its token is another")
            line.end()
            return
        if address is None:  # it has dialled
            line.post(self.hello())
        differences = {
            f"it has version {hello.version}": hello.version != self.version,
            "its upstreams, routes or rules are others": hello.digest != self.digest,
        }
        why = "; ".join(text for text, differs in differences.items() if differs)
        if why:
            self.refuse(name, why)
            line.end()
            return
        self.refused.pop(name, None)
        if address is not None and not self.member.yields_to(hello):
            again = SELF if hello.name == self.member.name else YOUNGER
            self._next[address] = time.monotonic() + again
            line.end()
            return
        self.member.connected(time.monotonic(), line, hello, address is not None)

    def closed(self, line: Line) -> None:
        """A connection is gone."""
        self._lines.discard(line)
        if line.address is not None and self._next[line.address] == float("inf"):
            self._next[line.address] = time.monotonic() + AGAIN
        self.member.closed(time.monotonic(), line)


class Line(asyncio.Protocol):
    """A connection to another member.

    Args:
        links: that it is of.
        address: that it was opened to; None: the other has opened it.
    """

    def __init__(self, links: Links, address: Address | None) -> None:
        self._links, self.address, self.name = links, address, str(address)
        self._frames, self._posted = Frames(), list[Message]()
        self._transport: asyncio.Transport | None = None
        self._is_greeted = self._is_ended = False
        self._loop = asyncio.get_running_loop()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Present this member if it has opened the connection."""
        self._transport = cast(asyncio.Transport, transport)
        if self.address is None:
            self.name = str(transport.get_extra_info("peername")[:1] or "a process of this machine")
        else:
            self.post(self._links.hello())
        self._links.opened(self)
        self._loop.call_later(GREETING, self._check_greeting)

    def _check_greeting(self) -> None:
        if not self._is_greeted:
            self.close()

    def data_received(self, data: bytes) -> None:
        """Pass messages on to the member."""
        try:
            for message in self._frames.feed(data):
                if self._is_ended:
                    return
                if self._is_greeted:
                    self._links.member.receive(time.monotonic(), self, message)
                elif isinstance(message, Hello):
                    self._is_greeted = True
                    self._frames.trust()
                    self._links.greeted(self, message)
                else:
                    raise BadFrame("it does not present itself")
        except Exception as error:  # whatever it sends, the gateway goes on
            if isinstance(error, BadFrame):
                self._links.strangers.log(
                    "a member's line", logging.ERROR, member=self.name, reason=described(error)
                )
            else:  # a fault of ours, with its traceback
                log_event("a member's line", logging.ERROR, error, reason=described(error))
            self.close()
            self._links.closed(self)

    def connection_lost(self, _: Exception | None) -> None:
        """Let the member know."""
        self._is_ended = True
        self._links.closed(self)

    def post(self, message: Message) -> None:
        """Send a message, with all others of this turn of the event loop."""
        if not self._posted:
            self._loop.call_soon(self._flush)
        self._posted.append(message)

    def _flush(self) -> None:
        posted, self._posted = self._posted, []
        if posted and not self._is_ended and self._transport is not None:
            self._transport.write(encode(posted))

    def end(self) -> None:
        """Close it once all is sent."""
        self._flush()
        self._is_ended = True
        if self._transport is not None:
            self._transport.close()

    def close(self) -> None:
        """Close it at once."""
        self._is_ended = True
        if self._transport is not None:
            self._transport.abort()
