"""Who may talk to a service: tokens, and the names that it is called by."""

from __future__ import annotations

import numpy as np
import pytest

from codedinvnet.models.bundle import Bundle
from tests.serving.api.service import TOKEN, error, serving


class TestToken:
    OPEN = (
        "/v2/health/live",
        "/v2/health/ready",
        "/v2/models/mnist/ready",
        "/v2/models/mnist/versions/1/ready",
        "/",
    )
    CLOSED = (
        "/v2",
        "/v2/models/mnist/versions/1",
        "/v2/models/mnist",
        "/metrics",
        "/page/state",
        "/demo/requests",
        "/policy",
        "/nowhere",
    )

    async def test_who_is_let_in(self, mnist: Bundle, images: np.ndarray) -> None:
        async with serving(mnist, token=TOKEN, demo=images) as service:
            client = service.client
            for path in self.OPEN:
                assert (await client.get(path)).status_code == 200
            wrong = ("", TOKEN, f"Bearer {TOKEN}x", "Bearer", f"bearer{TOKEN}", "Bearer \xe9")
            for given in wrong:
                headers = {b"Authorization": given.encode("latin-1")}
                for path in self.CLOSED:
                    response = await client.get(path, headers=headers)
                    assert "a bearer token is needed" in error(response, 401)
                    assert response.headers["www-authenticate"] == "Bearer"
            error(await service.infer(images[:1]), 401)
            assert service.count(401) == 1
            error(await client.post("/demo/workers/0/kill"), 401)
            client.headers["Authorization"] = f"Bearer {TOKEN}"
            for path in self.CLOSED[:-1]:
                assert (await client.get(path)).status_code == 200
            assert (await service.infer(images[:1])).status_code == 200
            client.headers["Authorization"] = f"bearer {TOKEN}"  # of any case, says HTTP
            assert (await service.infer(images[:1])).status_code == 200


class TestHost:
    """After DNS rebinding only its name tells a page of another site from ours."""

    @pytest.mark.parametrize(
        ("hosts", "known", "others"),
        [
            (
                (),
                ["localhost", "LOCALHOST:8000", "127.0.0.1:1", "[::1]", "[::1]:8000"],
                ["evil.test", "localhost.evil.test", "10.0.0.5", "", "[::2]:8000", "x" * 999],
            ),
            (
                ("0.0.0.0", "Our.example"),
                ["10.0.0.5:8000", "[fe80::1]:8000", "our.example", "our.example:8000"],
                ["evil.test", "10.0.0.5.evil.test", "our.example.evil.test", "2130706433.evil"],
            ),
            (("192.168.1.7",), ["192.168.1.7:8000", "localhost"], ["192.168.1.8"]),
            (("*",), ["evil.test", "10.0.0.5"], []),
        ],
        ids=["loopback", "any address", "one address", "any"],
    )
    async def test_names(
        self, hosts: tuple[str, ...], known: list[str], others: list[str], mnist: Bundle
    ) -> None:
        async with serving(mnist, hosts=hosts) as service:

            async def status(name: str) -> int:
                return (await service.client.get("/page/state", headers={"Host": name})).status_code

            assert [await status(name) for name in known] == [200] * len(known)
            assert [await status(name) for name in others] == [421] * len(others)

    async def test_all_requests(self, mnist: Bundle, images: np.ndarray) -> None:
        async with serving(mnist, demo=images, token=TOKEN) as service:
            client = service.client
            client.headers["Host"] = "evil.test"
            error(await service.infer(images[:1]), 421)
            for path in ("/", "/metrics", "/v2/health/live", "/demo/requests"):
                error(await client.get(path), 421)
            assert "known" in error(await client.post("/demo/workers/0/kill"), 421)

    async def test_no_redirect_and_no_frame(self, mnist: Bundle) -> None:
        async with serving(mnist) as service:
            error(await service.client.get("/metrics/"), 404)
            page = await service.client.get("/")
            assert page.headers["X-Frame-Options"] == "DENY"
            assert page.headers["Content-Security-Policy"] == "frame-ancestors 'none'"

    async def test_who_says_no_name_is_no_browser(self, mnist: Bundle) -> None:
        async with serving(mnist) as service:
            client = await service.connect(b"GET /nowhere HTTP/1.0\r\n\r\n")
            assert (await client.answer()).startswith(b"HTTP/1.1 404 ")
