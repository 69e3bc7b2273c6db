"""What README and SECURITY.md promise an operator about tokens, over HTTP and gRPC."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from codedinvnet.net.client import HttpClient, parse_origin
from tests.gateway.support import V2, gateway
from tests.upstream import Upstream

TOKEN = "s3cret-Token"
WRONG = (
    None, "", "Bearer", "Bearer ", f"Bearer {TOKEN}x", f"Bearer {TOKEN[:-1]}",
    f"Bearer {TOKEN.upper()}", f"Bearer {TOKEN.lower()}", f"Bearer x {TOKEN}",
    f"Basic {TOKEN}", TOKEN, f"Bearer{TOKEN}",
)  # fmt: skip
"""Values of `Authorization` that must be refused; None: the field is missing."""
OWN = ("/metrics", "/codedinvnet/status", "/codedinvnet/policy")
OPEN = ("/livez", "/readyz", "/codedinvnet")


def authorization(value: str | None) -> dict[str, Any]:
    return {} if value is None else {"authorization": value}


@pytest.fixture
def token_file(tmp_path: Path) -> Path:
    path = tmp_path / "token"
    path.write_text(TOKEN + "\n")
    return path


@pytest.mark.parametrize("value", WRONG)
async def test_no_path_answers_without_the_right_token(token_file: Path, value: str | None) -> None:
    upstream = Upstream()
    async with gateway(upstream, token_file=token_file) as g:
        for path in ("/", V2, *OWN, "/LIVEZ", "/livez/", "/codedinvnet/", "//metrics"):
            for method in ("GET", "POST"):
                found = await g.ask(method, path, b"{}", **authorization(value))
                assert (path, method, found.status) == (path, method, 401)
        for path in OPEN:
            assert (await g.ask("GET", path, **authorization(value))).status == 200
        assert upstream.requests == []


@pytest.mark.parametrize("scheme", ["Bearer", "bearer", "BEARER"])
async def test_the_right_token_opens_every_path(token_file: Path, scheme: str) -> None:
    """The scheme's case doesn't matter (RFC 9110, 11.1)."""
    async with gateway(Upstream(), token_file=token_file) as g:
        for path in ("/", *OWN):
            found = await g.ask("GET", path, authorization=f"{scheme} {TOKEN}")
            assert (path, found.status) == (path, 200)


async def test_the_port_of_its_own_needs_the_token_too(token_file: Path) -> None:
    async with gateway(Upstream(), token_file=token_file, admin_port=0) as g:
        admin = HttpClient(parse_origin(g.gateway.admin_url))
        try:
            for path in OWN:
                for value in WRONG:
                    headers = list(authorization(value).items())
                    found = await admin.ask("GET", path, 5.0, headers=headers)
                    assert (path, value, found.status) == (path, value, 401)
                right = [("authorization", f"Bearer {TOKEN}")]
                assert (await admin.ask("GET", path, 5.0, headers=right)).status == 200
        finally:
            admin.close()


@pytest.mark.parametrize("own", [None, "upstreams-Own"])
async def test_clients_tokens_never_reach_upstreams(
    token_file: Path, tmp_path: Path, own: str | None
) -> None:
    """Whether or not upstreams get a token of the gateway's own."""
    options: dict[str, Any] = {}
    if own is not None:
        (tmp_path / "own").write_text(own)
        options["upstream_token_file"] = tmp_path / "own"
    upstream = Upstream()
    async with gateway(upstream, token_file=token_file, **options) as g:
        for method, path in (("GET", "/"), ("POST", V2), ("DELETE", "/x")):
            found = await g.ask(method, path, b"{}", authorization=f"Bearer {TOKEN}")
            assert found.status == 200
    for request in upstream.requests:
        assert TOKEN.encode() not in request.head
        expected = None if own is None else f"Bearer {own}"
        assert request.fields.get("authorization") == expected
    assert len(upstream.requests) == 3


async def test_clients_authorization_passes_where_the_gateway_has_no_token() -> None:
    upstream = Upstream()
    async with gateway(upstream) as g:
        await g.ask("GET", "/", authorization="Bearer of-the-model")
    assert upstream.requests[0].fields["authorization"] == "Bearer of-the-model"


async def test_upstreams_get_the_new_token_once_the_file_has_one(tmp_path: Path) -> None:
    path = tmp_path / "own"
    path.write_text("first")
    upstream = Upstream()

    def newest() -> str:
        return upstream.requests[-1].fields["authorization"]

    async with gateway(upstream, upstream_token_file=path) as g:
        await g.ask("GET", "/")
        assert newest() == "Bearer first"
        path.write_text("second")
        for _ in range(100):
            await g.ask("GET", "/")
            if newest() == "Bearer second":
                break
            await asyncio.sleep(0.1)
        assert newest() == "Bearer second"


async def test_it_is_not_ready_while_it_drains() -> None:
    """Balancers take it out; that it is alive stays true."""
    async with gateway(Upstream(), admin_port=0) as g:
        admin = HttpClient(parse_origin(g.gateway.admin_url))
        try:
            assert (await admin.ask("GET", "/readyz", 5.0)).status == 200
            assert g.gateway.admin is not None
            g.gateway.admin.is_draining = True
            found = await admin.ask("GET", "/readyz", 5.0)
            assert (found.status, found.body) == (503, b'{"error": "draining"}')
            assert (await admin.ask("GET", "/livez", 5.0)).status == 200
        finally:
            admin.close()


async def test_grpc_needs_the_token(token_file: Path) -> None:
    grpc = pytest.importorskip("grpc")
    from tests.gateway import test_grpc as over_grpc

    async with (
        over_grpc.Upstream() as one,
        over_grpc.gateway(one, token_file=token_file) as channel,
    ):
        for method in (over_grpc.ECHO, over_grpc.INFER, "/any.Service/Other"):
            call = channel.unary_unary(method)
            for value in WRONG:
                with pytest.raises(grpc.aio.AioRpcError) as error:
                    await call(b"x", metadata=list(authorization(value).items()))
                assert error.value.code() is grpc.StatusCode.UNAUTHENTICATED
            assert one.seen == []
            assert await call(b"x", metadata=[("authorization", f"Bearer {TOKEN}")]) == b"x"
            one.seen.clear()


async def test_clients_need_the_new_token_once_the_file_has_one(token_file: Path) -> None:
    async def status(token: str) -> int:
        return (await g.ask("GET", "/", authorization=f"Bearer {token}")).status

    async with gateway(Upstream(), token_file=token_file) as g:
        token_file.write_text("")  # no token: the old one is kept
        await asyncio.sleep(1.5)
        assert (await status(TOKEN), await status("")) == (200, 401)
        token_file.write_text("another")
        for _ in range(100):
            if await status("another") == 200:
                break
            await asyncio.sleep(0.1)
        assert (await status(TOKEN), await status("another")) == (401, 200)
