"""The interface of an upstream, how one is opened, and one that is reached over HTTP.

`grpc_upstream` has the other.
"""

from __future__ import annotations

import asyncio
import json
import os
import socket
import ssl
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol
from urllib.parse import quote, urlsplit

from codedinvnet.errors import UserError, is_host
from codedinvnet.models.base import HEADER_LENGTH
from codedinvnet.models.upstream import Writes, check_server
from codedinvnet.serving.gateway.calls import (
    Call,
    Headers,
    NoFiles,
    NotProtocol,
    Reply,
    Unreachable,
    lacks_files,
    passed_on,
    problem,
)
from codedinvnet.serving.gateway.http_client import CONNECT_TIMEOUT, Answer, Broken, HttpClient
from codedinvnet.serving.served import OUTCOME

if TYPE_CHECKING:  # it needs gRPC's package
    from codedinvnet.serving.gateway.translation import Post

REFUSALS = {"http": (401, 403), "grpc": (16, 7)}
"""Statuses that want a token, or another one."""
SCHEMES = {"http": 80, "https": 443, "grpc": 8001, "grpcs": 443}
"""Scheme -> the port if the URL names none."""
SECURE = frozenset({"https", "grpcs"})
"""Those over TLS."""
ABOUT_TENSORS = ("content-type", HEADER_LENGTH.lower())
"""Headers about a body with binary tensors."""
OWN_OUTPUTS = (OUTCOME, f"codedinvnet.{OUTCOME}")
"""Outputs that `codedinvnet serve` adds to those of a model."""


@dataclass
class OwnHeaders:
    """Headers that are sent with all that servers are asked; they may change meanwhile.

    Attributes:
        headers: for gRPC their names must be in lower case.
        flag: the option that a gateway has them from; "": they are the asker's own affair.
    """

    headers: Headers = ()
    flag: str = ""

    def beside(self, theirs: Headers) -> Headers:
        """Return them and those of a call, but for what both have."""
        if not self.headers:
            return theirs
        names = {name.lower() for name, _ in self.headers}
        return (*self.headers, *(header for header in theirs if header[0].lower() not in names))

    def refusal(self, reply: Reply) -> str:
        """Return what to tell of an answer that wants a token, or another one; "" of others."""
        if reply.status not in REFUSALS[reply.transport]:
            return ""
        hint = f" ({self.flag})" if self.flag else ""
        return f"it wants a token, or another one{hint}: {reply}"

    def taken(self, reply: Reply) -> Reply:
        """Return an answer to a call, unless it refuses what a gateway shows in its clients' place.

        Raises:
            Unreachable: if it does: that is no client's fault.
        """
        told = self.refusal(reply) if self.flag and self.headers else ""
        if told:
            http = reply.transport == "http"
            raise Unreachable(told, problem(503, told) if http else Reply("grpc", 14, message=told))
        return reply


class Upstream(Protocol):
    """A server that answers calls."""

    url: str
    """Its address, as the user gave it; metrics and the log call it so."""
    own: OwnHeaders
    tries: int
    """How often a request is written to a kept connection that turns out to be closed."""

    @property
    def translates(self) -> bool:
        """Whether calls over HTTP are written anew for it."""

    @property
    def stops(self) -> bool:
        """Whether it can be told to stop working at a call."""

    async def infer(self, call: Call, seconds: float) -> Reply:
        """Return its answer to a call.

        Raises:
            Unreachable: if there is none, or it refuses the gateway's token.
        """

    async def is_ready(self, model: str, seconds: float) -> bool:
        """Tell whether it says that it has the model ready.

        Raises:
            Unreachable: if it says nothing, or wants another token for that.
        """

    async def metadata(self, model: str, version: str, seconds: float) -> Mapping[str, Any]:
        """Return the model's metadata.

        Raises:
            Unreachable: if it says nothing, or fails: a proxy before it, or while it loads; or if
                it wants another token for that.
            NotProtocol: if it has no such model, or what it says is no metadata.
        """

    async def close(self, grace: float | None = 0.0) -> None:
        """Close its connections, over which nothing new is asked.

        Args:
            grace: seconds after which calls over gRPC are cancelled; None: they end by themselves.
        """


class Nobody:
    """Stands where an upstream may come later."""

    url, stops, translates = "", False, False
    own = OwnHeaders()
    tries = 1

    async def infer(self, call: Call, seconds: float) -> Reply:
        raise Unreachable("no upstream is there")

    async def is_ready(self, model: str, seconds: float) -> bool:
        raise Unreachable("no upstream is there")

    async def metadata(self, model: str, version: str, seconds: float) -> Mapping[str, Any]:
        raise Unreachable("no upstream is there")

    async def close(self, grace: float | None = 0.0) -> None:
        """There is nothing to close."""


def open_upstream(
    url: str,
    roots: bytes | None = None,
    own: OwnHeaders | None = None,
    flag: str = "--upstream",
    connect: float | None = None,
) -> Upstream:
    """Return an upstream, not yet connected.

    Args:
        url: http://HOST[:PORT][/PREFIX], https://..., grpc://HOST[:PORT] or grpcs://...; over TLS
            it may end with #NAME, if the certificate is not the host's but that name's.
        roots: certificates to trust over TLS, PEM; None: those that this machine trusts.
        own: headers for all that it is asked; None: there are none.
        flag: which option has it, for messages.
        connect: seconds in which a connection must be there; None: 1 over HTTP, over gRPC that
            package's own.

    Raises:
        UserError: if the URL is none, or that of a model.
    """
    try:
        found = urlsplit(url)
        port = found.port or SCHEMES.get(found.scheme)
    except ValueError as error:
        raise UserError(f"{flag}: {url!r} is no URL: {error}") from error
    secure = found.scheme in SECURE
    alien = found.query or (found.fragment and not secure)
    if found.scheme not in SCHEMES or not found.hostname or alien:
        known = ", ".join(f"{scheme}://HOST:PORT" for scheme in SCHEMES)
        raise UserError(f"{flag}: {url!r} is not one of {known}")
    for name in filter(None, (found.hostname, found.fragment)):
        if not is_host(name):
            raise UserError(f"{flag}: {url!r} is no URL: {name!r} is no host's name")
    if found.username is not None:
        raise UserError(f"{flag}: {found.hostname}: a URL with a password is not taken")
    check_server(url, flag)
    host = f"[{found.hostname}]" if ":" in found.hostname else found.hostname
    own = OwnHeaders() if own is None else own
    if found.scheme in ("http", "https"):
        base = f"{found.scheme}://{host}:{port}{found.path.rstrip('/')}"
        limit = CONNECT_TIMEOUT if connect is None else connect
        return HttpUpstream(url, base, roots, own, limit, found.fragment)
    if found.path.strip("/"):
        raise UserError(f"{flag}: {url!r}: a gRPC address has no path")
    from codedinvnet.serving.gateway.grpc_upstream import GrpcUpstream

    target = f"{host}:{port}"
    return GrpcUpstream(url, target, secure, roots, own, connect, found.fragment)


def model_path(model: str, version: str) -> str:
    """Return a model's path in the protocol."""
    versions = f"/versions/{quote(version, safe='')}" if version else ""
    return f"/v2/models/{quote(model, safe='')}{versions}"


def no_metadata(model: str, reply: Reply, own: OwnHeaders) -> Unreachable | NotProtocol:
    """Return what an error means that an upstream answers when asked for a model's metadata."""
    if told := own.refusal(reply):
        return Unreachable(told)
    if reply.fails:
        return Unreachable(str(reply))
    return NotProtocol(f"it has no model {model!r}: {reply}")


def described(error: OSError) -> str:
    """Return what is wrong with a connection."""
    if error.errno and error.errno > 0 and not isinstance(error, ssl.SSLError):
        return os.strerror(error.errno)
    return error.strerror or str(error) or type(error).__name__


class HttpUpstream:
    """A server that is reached over HTTP.

    Args:
        url: as the user gave it.
        base: what the protocol's paths follow.
        roots: see `open_upstream`.
        own: likewise.
        connect: seconds in which a connection must be there.
        certified: the name that its certificate must have; "": its host's.
    """

    stops = translates = False
    tries = 2

    def __init__(
        self,
        url: str,
        base: str,
        roots: bytes | None,
        own: OwnHeaders,
        connect: float,
        certified: str = "",
    ) -> None:
        self.url, self.own, found = url, own, urlsplit(base)
        self.prefix, context = quote(found.path, safe="/%"), None
        if found.scheme == "https":
            context = ssl.create_default_context(cadata=None if roots is None else roots.decode())
        assert found.hostname is not None
        assert found.port is not None
        self._client = HttpClient(found.hostname, found.port, context, connect, certified)
        self._takes_binary: bool | None = None
        """Whether it takes binary tensors; None until it has answered a question of our own."""

    async def _ask(
        self,
        method: str,
        path: str,
        seconds: float,
        body: bytes | None = None,
        headers: Headers = (),
    ) -> Answer:
        """Return an answer.

        Raises:
            Unreachable: if there is none in so many seconds, or no connection.
            NoFiles: if that is for want of files here.
        """
        path, headers = self.prefix + path, self.own.beside(headers)
        try:
            return await self._client.ask(method, path, seconds, body, headers, tries=self.tries)
        except asyncio.TimeoutError as error:
            raise Unreachable(str(error)) from None
        except OSError as error:
            # Who looks a name up has files to read, and says no more than that it failed.
            if lacks_files(None if isinstance(error, socket.gaierror) else error):
                raise NoFiles from error
            raise Unreachable(described(error), sent=isinstance(error, Broken)) from error

    async def infer(self, call: Call, seconds: float) -> Reply:
        path = (
            f"{model_path(call.model, call.version)}/infer{call.url_query and f'?{call.url_query}'}"
        )
        until = time.monotonic() + seconds

        async def post(body: bytes, headers: Headers) -> Reply:
            left = max(until - time.monotonic(), 0.0)
            status, found, data = await self._ask("POST", path, left, body, headers)
            return Reply("http", status, data, passed_on(found))

        if call.transport == "grpc":
            from codedinvnet.serving.gateway.translation import through_http

            return self.own.taken(await through_http(call, post))
        if call.in_json is None:
            return self.own.taken(await post(call.body, call.headers))
        return self.own.taken(await self._answer_to_own(call, call.in_json, post))

    async def _answer_to_own(self, call: Call, in_json: Writes, post: Post) -> Reply:
        """Return the answer to a question of the gateway's own, with binary tensors if it can be.

        A refusal may be for the tensors' form or for what they say: the answer in JSON tells.
        """
        if self._takes_binary is not False:
            reply = await post(call.body, call.headers)
            if reply.status == 200:
                self._takes_binary = True
            if self._takes_binary or not self._refuses(reply):
                return reply
        body, told = await asyncio.to_thread(in_json)
        others = (header for header in call.headers if header[0] not in ABOUT_TENSORS)
        reply = await post(body, (*others, *told.items()))
        if reply.status == 200:
            self._takes_binary = False
        return reply

    def _refuses(self, reply: Reply) -> bool:
        """Tell whether an answer may be that of a server that cannot read the request.

        MLServer fails at one with binary tensors, by status 500.
        """
        wrong = 400 <= reply.status < 500 and not reply.fails and not self.own.refusal(reply)
        return wrong or reply.status == 500

    async def is_ready(self, model: str, seconds: float) -> bool:
        status, _, body = await self._ask("GET", f"{model_path(model, '')}/ready", seconds)
        if told := self.own.refusal(Reply("http", status, body)):
            raise Unreachable(told)
        return status == 200

    async def metadata(self, model: str, version: str, seconds: float) -> Mapping[str, Any]:
        self._takes_binary = None  # one that comes back is asked for them: another may be there
        status, _, body = await self._ask("GET", model_path(model, version), seconds)
        if status != 200:
            raise no_metadata(model, Reply("http", status, body.strip()), self.own)
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

    async def close(self, grace: float | None = 0.0) -> None:
        self._client.close()


def difference(one: Mapping[str, Any], other: Mapping[str, Any]) -> str:
    """Return in which inputs or outputs two models' metadata differ, or "".

    The outcome that `codedinvnet serve` adds to a model's outputs is no difference.
    """
    for key in ("inputs", "outputs"):
        mine, theirs = (
            {t["name"]: (t["datatype"], [int(n) for n in t["shape"]]) for t in metadata[key]}
            for metadata in (one, other)
        )
        for name in {**theirs, **mine}:
            added = name in OWN_OUTPUTS and None in (mine.get(name), theirs.get(name))
            if mine.get(name) != theirs.get(name) and not added:
                told = [
                    "nothing" if t.get(name) is None else f"{t[name][0]} {json.dumps(t[name][1])}"
                    for t in (theirs, mine)
                ]
                return f"{key} {name!r}: {told[0]} and {told[1]}"
    return ""
