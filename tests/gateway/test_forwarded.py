"""What upstreams are told of clients, and what clients can't make them believe."""

from __future__ import annotations

import asyncio
import logging
import re

import pytest

from tests.gateway.support import Running, gateway
from tests.upstream import Upstream, saying

CLAIMED = {
    "x_forwarded_for": "203.0.113.9, 198.51.100.7",
    "x_forwarded_proto": "https",
    "x_forwarded_host": "bank.example",
    "forwarded": "for=203.0.113.9;proto=https, for=198.51.100.7",
}


async def told(g: Running, **sent: str) -> dict[str, str]:
    """Return the fields that the upstream gets for a request."""
    await g.ask("GET", "/a", None, **sent)
    return g.upstreams[0].requests[-1].fields


async def test_upstreams_are_told_who_sent_a_request_and_not_what_clients_claim() -> None:
    async with gateway(Upstream()) as g:
        host = f"127.0.0.1:{g.client.origin.port}"
        for sent in ({}, CLAIMED):
            fields = await told(g, **sent)
            assert fields["x-forwarded-for"] == "127.0.0.1"
            assert fields["x-forwarded-proto"] == "http"
            assert fields["x-forwarded-host"] == host
            assert fields["forwarded"] == f'for=127.0.0.1;proto=http;host="{host}"'


async def test_as_much_is_believed_as_there_are_proxies_of_the_operators() -> None:
    async with gateway(Upstream(), trusted_hops=1) as g:
        fields = await told(g, **CLAIMED)
        assert fields["x-forwarded-for"] == "198.51.100.7, 127.0.0.1"
        assert fields["x-forwarded-proto"] == "https"
        assert fields["x-forwarded-host"] == "bank.example"
        assert fields["forwarded"].startswith("for=198.51.100.7, for=127.0.0.1;proto=https;host=")
        assert (await told(g))["x-forwarded-for"] == "127.0.0.1"
        assert (await told(g, x_forwarded_proto="gopher"))["x-forwarded-proto"] == "http"


async def test_a_request_has_a_number_which_is_kept_and_logged(
    caplog: pytest.LogCaptureFixture,
) -> None:
    fails = saying(b"no", 500)
    caplog.set_level(logging.WARNING)
    async with gateway(Upstream(), Upstream(fails)) as g:
        made = {(await told(g))["x-request-id"] for _ in range(3)}
        assert len(made) == 3
        assert all(re.fullmatch("[0-9a-f]{32}", each) for each in made)
        assert (await told(g, x_request_id="mine-7"))["x-request-id"] == "mine-7"
        assert (await told(g, x_request_id="x" * 200))["x-request-id"] != "x" * 200
    async with gateway(fails) as g:

        def logged() -> bool:
            fields = (getattr(record, "fields", {}) for record in caplog.records)
            return "mine-8" in [each.get("request_id") for each in fields]

        while not logged():  # of many alike, one a second is
            assert (await g.ask("GET", "/a", x_request_id="mine-8")).status == 500
            await asyncio.sleep(0.1)
