"""One upstream: a server that speaks the protocol, reached over HTTP or gRPC."""

from __future__ import annotations

import asyncio
import io
import json
import os
import ssl
from collections.abc import Mapping
from typing import Any, Protocol
from urllib.parse import quote, urlsplit

import aiohttp

from codedinvnet.errors import UserError
from codedinvnet.serving.gateway.calls import (
    Call,
    Headers,
    NotProtocol,
    Reply,
    Unreachable,
    passed_on,
)

SCHEMES = {"http": 80, "https": 443, "grpc": 8001, "grpcs": 443}
"""Scheme -> the port if the URL names none."""
LARGE = 512 * 1024
"""Bytes of a request from which it is written piece by piece."""
CONNECT_TIMEOUT = 1.0
"""Seconds in which a connection must be there."""


class Upstream(Protocol):
    """A server that answers calls."""

    headers: Headers
    """Sent with all that is asked."""
    tries: int
    """How often a request is written to a kept connection that turns out to be closed."""

    @property
    def url(self) -> str:
        """Its address, as the user gave it."""

    @property
    def stops(self) -> bool:
        """Whether it can be told to stop working at a call."""

    async def infer(self, call: Call, seconds: float) -> Reply:
        """Return its answer to a call.

        Raises:
            Unreachable: if there is none.
        """

    async def is_ready(self, model: str, seconds: float) -> bool:
        """Tell whether it says that it has the model ready.

        Raises:
            Unreachable: if it says nothing.
        """

    async def metadata(self, model: str, version: str, seconds: float) -> Mapping[str, Any]:
        """Return the model's metadata.

        Raises:
            Unreachable: if it says nothing.
            NotProtocol: if it has no such model, or what it says is no metadata.
        """

    async def close(self) -> None:
        """Close its connections."""


class Nobody:
    """Stands where an upstream may come later."""

    url, stops = "", False
    headers: Headers = ()
    tries = 1

    async def infer(self, call: Call, seconds: float) -> Reply:
        raise Unreachable("no upstream is there")

    async def is_ready(self, model: str, seconds: float) -> bool:
        raise Unreachable("no upstream is there")

    async def metadata(self, model: str, version: str, seconds: float) -> Mapping[str, Any]:
        raise Unreachable("no upstream is there")

    async def close(self) -> None:
        """There is nothing to close."""


def open_upstream(url: str, roots: bytes | None = None, flag: str = "--upstream") -> Upstream:
    """Return an upstream, not yet connected.

    Args:
        url: http://HOST[:PORT][/PREFIX], https://..., grpc://HOST[:PORT] or grpcs://...
        roots: certificates to trust over TLS, PEM; None: those that this machine trusts.
        flag: which option has it, for messages.

    Raises:
        UserError: if the URL is none.
    """
    try:
        found = urlsplit(url)
        port = found.port or SCHEMES.get(found.scheme)
    except ValueError as error:
        raise UserError(f"{flag}: {url!r} is no URL: {error}") from error
    if found.scheme not in SCHEMES or not found.hostname or found.query or found.fragment:
        known = ", ".join(f"{scheme}://HOST:PORT" for scheme in SCHEMES)
        raise UserError(f"{flag}: {url!r} is not one of {known}")
    if found.username is not None:
        raise UserError(f"{flag}: {found.hostname}: a URL with a password is not taken")
    host = f"[{found.hostname}]" if ":" in found.hostname else found.hostname
    if found.scheme in ("http", "https"):
        base = f"{found.scheme}://{host}:{port}{found.path.rstrip('/')}"
        return HttpUpstream(url, base, roots)
    if found.path.strip("/"):
        raise UserError(f"{flag}: {url!r}: a gRPC address has no path")
    from codedinvnet.serving.gateway.grpc_upstream import GrpcUpstream

    return GrpcUpstream(url, f"{host}:{port}", found.scheme == "grpcs", roots)


def model_path(model: str, version: str) -> str:
    """Return a model's path in the protocol."""
    versions = f"/versions/{quote(version, safe='')}" if version else ""
    return f"/v2/models/{quote(model, safe='')}{versions}"


def as_text(value: str) -> str:
    """Return a header's value, read as Latin-1, so that it is sent in the bytes that came."""
    try:
        return value if value.isascii() else value.encode("latin-1").decode()
    except UnicodeDecodeError:
        return value


def described(error: BaseException) -> str:
    """Return an error's message, or its kind if it has none."""
    if isinstance(error, aiohttp.ClientConnectorError):
        cause = error.os_error
        if cause.errno and not isinstance(cause, ssl.SSLError | ssl.CertificateError):
            return os.strerror(cause.errno)
    return str(error) or type(error).__name__


class CleanConnector(aiohttp.TCPConnector):
    """Keeps connections, and uses none again on which something came that nobody had asked for.

    The next request would take that for its answer.
    """

    async def _get(self, *args: Any) -> Any:
        while (found := await super()._get(*args)) is not None:
            if found.protocol is not None and not found.protocol.should_close:
                return found
            found.close()
        return None


class HttpUpstream:
    """A server that is reached over HTTP.

    Args:
        url: as the user gave it.
        base: what the protocol's paths follow.
        roots: see `open_upstream`.
    """

    stops = False
    headers: Headers = ()
    tries = 2

    def __init__(self, url: str, base: str, roots: bytes | None = None) -> None:
        self.url, self.base, self.roots = url, base, roots
        self._session: aiohttp.ClientSession | None = None

    @property
    def session(self) -> aiohttp.ClientSession:
        """Its kept connections; in the event loop that first asks."""
        if self._session is None:
            trusted = None if self.roots is None else self.roots.decode()
            context = ssl.create_default_context(cadata=trusted)
            self._session = aiohttp.ClientSession(
                connector=CleanConnector(limit=0, ssl=context),
                auto_decompress=False,
                skip_auto_headers=("User-Agent", "Accept", "Accept-Encoding", "Content-Type"),
                cookie_jar=aiohttp.DummyCookieJar(),
            )
        return self._session

    async def _ask(
        self,
        method: str,
        path: str,
        seconds: float,
        body: bytes | None = None,
        headers: Headers = (),
    ) -> tuple[int, Headers, bytes]:
        """Return status, headers and body of an answer.

        Raises:
            Unreachable: if there is none in so many seconds.
        """
        timeout = aiohttp.ClientTimeout(total=seconds, sock_connect=min(seconds, CONNECT_TIMEOUT))
        for attempt in range(self.tries):
            data = io.BytesIO(body) if body is not None and len(body) > LARGE else body
            try:
                async with self.session.request(
                    method,
                    self.base + path,
                    data=data,
                    headers=[(n, as_text(value)) for n, value in (*self.headers, *headers)],
                    timeout=timeout,
                    allow_redirects=False,
                ) as answer:
                    found = tuple(
                        (name.decode("latin-1").lower(), value.decode("latin-1"))
                        for name, value in answer.raw_headers
                    )
                    return answer.status, found, await answer.read()
            except asyncio.TimeoutError:
                raise Unreachable(f"no answer within {seconds:.3g} s") from None
            except (aiohttp.ServerDisconnectedError, ConnectionResetError) as error:
                # A kept connection may have been closed as the request was written to it.
                if attempt + 1 == self.tries or self.session.closed:
                    raise Unreachable(described(error)) from error
            except (aiohttp.ClientError, OSError) as error:
                raise Unreachable(described(error)) from error
        raise AssertionError

    async def infer(self, call: Call, seconds: float) -> Reply:
        path = f"{model_path(call.model, call.version)}/infer"

        async def post(body: bytes, headers: Headers) -> Reply:
            status, found, data = await self._ask("POST", path, seconds, body, headers)
            return Reply("http", status, data, passed_on(found))

        if call.transport == "grpc":
            from codedinvnet.serving.gateway.translation import through_http

            return await through_http(call, post)
        return await post(call.body, call.headers)

    async def is_ready(self, model: str, seconds: float) -> bool:
        status, _, _ = await self._ask("GET", f"{model_path(model, '')}/ready", seconds)
        return status == 200

    async def metadata(self, model: str, version: str, seconds: float) -> Mapping[str, Any]:
        status, _, body = await self._ask("GET", model_path(model, version), seconds)
        if status != 200:
            said = body[:200].decode(errors="replace").strip()
            raise NotProtocol(f"it has no model {model!r}: HTTP status {status}: {said}")
        try:
            found: Mapping[str, Any] = json.loads(body)
            for tensor in (*found["inputs"], *found["outputs"]):
                str(tensor["name"]), str(tensor["datatype"]), [int(n) for n in tensor["shape"]]
        except (ValueError, TypeError, KeyError) as error:
            said = body[:100].decode(errors="replace")
            raise NotProtocol(
                f"its metadata are not the Open Inference Protocol's: {said}"
            ) from error
        return found

    async def close(self) -> None:
        if self._session is not None:
            await self._session.close()
