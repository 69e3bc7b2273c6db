"""What a page of another site can't do through the browser of a gateway's user."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.gateway.support import gateway
from tests.upstream import Upstream

EVIL, POLICY = "evil.example", b'{"policy":"uncoded"}'


def get(path: str, host: str) -> bytes:
    return f"GET {path} HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n".encode()


def change(host: str, origin: str, more: str = "") -> bytes:
    origin = f"Origin: {origin}\r\n" if origin else ""
    return (
        f"POST /codedinvnet/policy HTTP/1.1\r\nHost: {host}\r\n{origin}{more}Connection: close\r\n"
        f"Content-Type: application/json\r\nContent-Length: {len(POLICY)}\r\n\r\n"
    ).encode() + POLICY


def status(said: bytes) -> int:
    return int(said[9:12])


@pytest.mark.parametrize("path", ["/", "/metrics", "/codedinvnet/status", "/codedinvnet", "/livez"])
async def test_rebinding_reads_nothing_through_a_gateway_on_the_loopback(
    path: str, tmp_path: Path
) -> None:
    """The browser is led here by a name of the page's own, and the gateway has a token to lend."""
    (tmp_path / "own").write_text("secret")
    upstream = Upstream()
    async with gateway(upstream, upstream_token_file=tmp_path / "own", allow_host=()) as g:
        port = g.client.origin.port
        for name in (EVIL, f"{EVIL}:{port}", "10.0.0.5", "127.0.0.1.evil.example", "a"):
            assert status(await g.raw(get(path, name), False)) == 421
        assert (
            status(await g.raw(get(path, EVIL).replace(b"/", b"http://evil.example/", 1), False))
            == 421
        )
        assert upstream.requests == []
        for name in ("localhost", f"127.0.0.1:{port}", "[::1]:1", "LOCALHOST:80"):
            assert status(await g.raw(get(path, name), False)) == 200


async def test_names_that_the_operator_allows() -> None:
    async with gateway(Upstream(), allow_host=("Our.example", "[::2]")) as g:
        for name in ("our.example", "our.example:8000", "[::2]:8000", "localhost"):
            assert status(await g.raw(get("/", name), False)) == 200
        assert status(await g.raw(get("/", "their.example"), False)) == 421


async def test_other_machines_may_call_it_by_any_name_unless_some_are_allowed() -> None:
    """Balancers, Kubernetes' services and its probes by address have names of their own for it."""
    names = ("gateway.default.svc.cluster.local:8000", "10.1.2.3:8000", "shop.example")
    async with gateway(Upstream(), host="0.0.0.0", allow_host=()) as g:
        for name in names:
            assert status(await g.raw(get("/", name), False)) == 200
            assert status(await g.raw(get("/readyz", name), False)) == 200
    async with gateway(Upstream(), host="0.0.0.0", allow_host=("shop.example",)) as g:
        found = [status(await g.raw(get("/", name), False)) for name in names]
        assert found == [421, 200, 200]  # no address can be made to lead elsewhere


@pytest.mark.parametrize(
    ("host", "origin", "expected"),
    [
        (EVIL, f"http://{EVIL}", 421),
        ("localhost:1", f"http://{EVIL}", 403),
        ("localhost:1", "http://localhost:2", 403),
        ("localhost:1", "null", 403),
        ("localhost:1", "", 200),
        ("localhost:1", "http://localhost:1", 200),
        ("a", "https://a", 200),
        ("localhost:1", "https://a", 200),
    ],
)
async def test_no_page_of_another_site_changes_the_policy(
    host: str, origin: str, expected: int
) -> None:
    async with gateway(Upstream()) as g:
        assert status(await g.raw(change(host, origin), False)) == expected


async def test_no_page_of_another_site_changes_the_policy_with_the_token(tmp_path: Path) -> None:
    (tmp_path / "token").write_text("secret")
    bearer = "Authorization: Bearer secret\r\n"
    token = tmp_path / "token"
    async with gateway(Upstream(), host="0.0.0.0", token_file=token, allow_host=()) as g:
        assert status(await g.raw(change("b", "http://c", bearer), False)) == 403
        assert status(await g.raw(change("b", "http://b", bearer), False)) == 200
