"""Upstreams that fail, come, go, and must not be trusted; names and files that list them."""

from __future__ import annotations

import asyncio
import contextlib
import os
import threading
from pathlib import Path

import pytest

from codedinvnet.gateway import attempts, cluster, discovery
from codedinvnet.net.client import Answer
from codedinvnet.net.resolve import Address, Resolver, literal
from tests.gateway.support import INFER, V2, Running, gateway
from tests.observing import until
from tests.upstream import Request, Upstream, answer, echo, read_request, saying

STUB = b'{"error":"Stub process \'m_0_0\' is not healthy."}'
MUTEX = b'{"error":"Failed to obtain the health mutex"}'


async def many(g: Running, count: int, path: str = V2) -> list[Answer]:
    return [await g.ask("POST", path, INFER) for _ in range(count)]


@pytest.mark.parametrize("status", [404, 408, 429, 500, 502, 503, 307])
async def test_an_upstream_that_fails_requests_is_made_up_for_and_ejected(status: int) -> None:
    async with gateway(saying(b"{}", status), echo, echo) as g:
        found = await many(g, 40)
        assert {one.status for one in found} == {200}
        assert len(g.upstreams[0].requests) < 15
        assert g.metric("ejections_total", upstream=g.upstreams[0].url, cause="status") >= 1


@pytest.mark.parametrize("status", [200, 400, 401, 404, 413, 422, 500, 501, 503])
async def test_what_all_upstreams_say_is_the_requests_fault(status: int) -> None:
    async with gateway(*[saying(b"mine", status)] * 2) as g:
        found = await many(g, 20)
        assert {(one.status, one.body) for one in found} == {(status, b"mine")}
        assert g.metric("upstream_up") == 2
        is_failure = status in (404, 500, 503)
        assert found[0].field("codedinvnet-outcome") == ("failed" if is_failure else "")


async def test_failed_requests_are_not_sent_again_without_end() -> None:
    async with gateway(*[saying(b"{}", 500)] * 2) as g:
        await many(g, 300)
        sent = sum(len(upstream.requests) for upstream in g.upstreams)
        assert 300 <= sent <= 300 + 50 + 30 + 2
        assert g.metric("retries_total", result="refused") > 100


async def test_a_request_that_breaks_two_upstreams_is_sent_to_no_third() -> None:
    async def killed(request: Request, writer: asyncio.StreamWriter) -> None:
        writer.transport.abort()

    async with gateway(*[killed] * 4) as g:
        assert (await g.ask("POST", V2, INFER)).status == 502
        assert sum(bool(upstream.requests) for upstream in g.upstreams) == 2


async def test_an_upstream_that_is_gone_comes_back() -> None:
    async with gateway(echo, echo, deadline_ms=1000.0) as g:
        await g.upstreams[0].stop()
        await many(g, 5)
        assert g.metric("upstream_up") == 1
        await g.upstreams[1].stop()
        assert (await g.ask("POST", V2, INFER, x_hedge="off")).status in (502, 503, 504)
        await until(lambda: g.metric("upstream_up") == 0)
        assert (await g.ask("GET", "/readyz")).status == 503
        assert (await g.ask("POST", V2, INFER)).status == 503
        assert (await g.ask("GET", "/livez")).status == 200
        for upstream in g.upstreams:
            await upstream.start()
        await until(lambda: g.metric("upstream_up") == 2)
        assert {one.status for one in await many(g, 10)} == {200}


@pytest.mark.parametrize("health", [None, "/healthz"])
async def test_health(health: str | None) -> None:
    async with gateway(echo, echo, health=health) as g:
        g.upstreams[0].is_ready = False
        await until(lambda: g.metric("upstream_up") == 1)
        before = len(g.upstreams[0].requests)
        assert {one.status for one in await many(g, 10)} == {200}
        assert len(g.upstreams[0].requests) == before
        g.upstreams[0].is_ready = True
        await until(lambda: g.metric("upstream_up") == 2)


@pytest.mark.parametrize(("status", "up"), [(404, 1), (401, 1), (503, 0), (400, 0)])
async def test_without_v2_a_connection_tells_that_an_upstream_is_up(status: int, up: int) -> None:
    class Other(Upstream):
        async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            self.writers.add(writer)
            with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError):
                while True:
                    await read_request(reader)
                    writer.write(answer(b"no", status))

    async with gateway(Other()) as g:
        assert g.metric("upstream_up") == up
        await asyncio.sleep(1.2)
        assert g.metric("upstream_up") == up


@pytest.mark.parametrize("slots", [1, 8])
async def test_a_hung_upstream_that_the_kernel_connects_to_is_ejected(slots: int) -> None:
    """It has no health route."""
    runs = asyncio.Event()
    runs.set()

    class Plain(Upstream):
        async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            self.writers.add(writer)
            with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError):
                while True:
                    request = await read_request(reader)
                    await runs.wait()
                    writer.write(answer(request.body, 200 if request.body else 404))

    async with gateway(Plain(), echo, deadline_ms=1000.0, slots=slots) as g:
        await asyncio.gather(*(g.ask("POST", V2, INFER) for _ in range(8)))
        runs.clear()
        for _ in range(4):
            await asyncio.gather(*(g.ask("POST", V2, INFER) for _ in range(8)))
        await until(lambda: g.metric("upstream_up") == 1)
        await asyncio.sleep(1.5)
        assert g.metric("upstream_up") == 1
        runs.set()
        await until(lambda: g.metric("upstream_up") == 2)


# Triton's Python backend: what it was asked before it stood still answers the next request


@pytest.mark.parametrize("said", [STUB, MUTEX])
@pytest.mark.parametrize("abandoned", [False, True])
async def test_an_upstream_whose_stub_stood_still(
    said: bytes, abandoned: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its next answers are wrong until it restarts; none reaches a client."""
    monkeypatch.setattr(cluster, "SILENCE", 0.2)
    poisoned = asyncio.Event()

    async def triton(request: Request, writer: asyncio.StreamWriter) -> bytes:
        if poisoned.is_set():
            return answer(b"wrong")
        if "x-poison" in request.fields:
            await asyncio.sleep(0.5 if abandoned else 0.05)
            poisoned.set()
            return answer(said, 500)
        await asyncio.sleep(0.005)
        return answer(request.body)

    async with gateway(triton, echo, slots=8) as g:
        first, second = g.upstreams
        for _ in range(15):
            await asyncio.gather(*(g.ask("POST", V2, INFER) for _ in range(4)))
        while not any("x-poison" in request.fields for request in first.requests):
            assert (await g.ask("POST", V2, INFER, x_poison="1")).body == INFER
        await until(poisoned.is_set)
        await asyncio.sleep(0.05)
        assert g.metric("upstream_up", upstream=first.url) == 0
        asked = len(first.requests)
        for _ in range(30):
            assert (await g.ask("POST", V2, INFER)).body == INFER
        await asyncio.sleep(1.0)  # it says that it is ready, and has not restarted
        assert g.metric("upstream_up", upstream=first.url) == 0
        assert len(first.requests) == asked
        await first.stop()
        poisoned.clear()
        await first.start()
        await until(lambda: g.metric("upstream_up", upstream=first.url) == 1)
        await until(lambda: g.metric("upstream_up", upstream=second.url) == 1)


async def test_what_an_untrusted_upstream_has_in_hand_is_lost(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A late answer is held for a moment, in which its upstream is found out."""
    monkeypatch.setattr(attempts, "HOLD", 0.3)  # the real moment is short for a busy machine

    async def triton(request: Request, writer: asyncio.StreamWriter) -> bytes:
        if request.fields.get("x-kind") == "late":
            await asyncio.sleep(1.0)
            return answer(b"wrong")
        if request.fields.get("x-kind") == "error":
            await asyncio.sleep(1.0 - 0.1 + 0.05)
            return answer(STUB, 500)
        return answer(request.body)

    async with gateway(triton, policy="uncoded", slots=8) as g:
        late = asyncio.create_task(g.ask("POST", V2, INFER, x_kind="late"))
        await asyncio.sleep(0.1)
        error = asyncio.create_task(g.ask("POST", V2, b"{}", x_kind="error", x_hedge="off"))
        found = await error
        assert found.status in (500, 502)
        await asyncio.sleep(0.5)
        assert not late.done() or late.result().body != b"wrong"
        g.upstreams[0].handler = echo
        await g.upstreams[0].stop()
        await g.upstreams[0].start()
        assert (await late).body == INFER


# Which upstreams there are


async def test_a_name_whose_lookup_hangs_stops_nobody_else() -> None:
    over = threading.Event()

    def lookup(host: str, port: int) -> list[Address]:
        if host == "hangs.test":
            over.wait()
        return literal("127.0.0.1", port)

    upstream = Upstream()
    await upstream.start()
    urls = ("http://hangs.test:1", f"http://named.test:{upstream.port}", upstream.url)
    async with gateway(upstream, upstream=urls, resolver=Resolver(lookup)) as g:
        assert g.metric("upstream_up") == 2
        assert {one.status for one in await many(g, 50)} == {200}
    over.set()  # nor did it keep the gateway from stopping


async def test_the_addresses_of_a_name_and_a_file_are_followed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(discovery, "PERIOD", 0.5)
    upstreams = [Upstream() for _ in range(3)]
    for upstream in upstreams:
        await upstream.start()
    file = tmp_path / "upstreams"
    file.write_text(f"# the first\n{upstreams[0].url}\n")
    async with gateway(*upstreams, upstream=(), upstreams_file=file) as g:

        async def asked() -> list[bool]:
            before = [len(upstream.requests) for upstream in upstreams]
            await asyncio.gather(*(g.ask("POST", V2, INFER) for _ in range(30)))
            after = [len(upstream.requests) for upstream in upstreams]
            return [new > old for old, new in zip(before, after, strict=True)]

        assert await asked() == [True, False, False]
        file.write_text(f"{upstreams[1].url} # two\n{upstreams[2].url}\n")
        await until(lambda: g.metric("upstream_up") == 2 and len(list(here(g))) == 2)
        await until(lambda: g.metric("upstream_up", upstream=upstreams[0].url) == 0)
        assert await asked() == [False, True, True]
        file.write_text(f"{upstreams[1].url}\n{upstreams[2].url}\nhttp://127.0.0.1:1\n")
        await until(lambda: len(here(g)) == 3)
        assert up(g, "http://127.0.0.1:1") == 0.0  # an alert sees it
        assert up(g, upstreams[0].url) is None
        file.write_text("no url\n")
        await asyncio.sleep(0.7)
        assert await asked() == [False, True, True]
        for part in range(4):  # somebody is writing it
            file.write_text(upstreams[0].url[:-1] + "\n" + "#" * part)
            await asyncio.sleep(0.3)
        assert len(here(g)) == 3
        assert await asked() == [False, True, True]
        file.unlink()
        await asyncio.sleep(0.7)
        assert await asked() == [False, True, True]
        os.mkfifo(file)  # reading it would never end, and neither would the gateway
        await asyncio.sleep(0.7)
        assert await asked() == [False, True, True]


def up(g: Running, url: str) -> float | None:
    name = "codedinvnet_gateway_upstream_up"
    return g.gateway.metrics.registry.get_sample_value(name, {"upstream": url})


def here(g: Running) -> list[str]:
    assert g.gateway.dispatcher is not None
    return [endpoint.url for endpoint in g.gateway.dispatcher.cluster]


async def test_a_name_has_as_many_upstreams_as_addresses() -> None:
    found = ["127.0.0.1"]

    def lookup(host: str, port: int) -> list[Address]:
        return [one for host in found for one in literal(host, port)]

    upstream = Upstream()
    await upstream.start()
    url = f"dns+http://model.test:{upstream.port}/v9"
    async with gateway(upstream, upstream=(url,), resolver=Resolver(lookup)) as g:
        assert here(g) == [f"{upstream.url}/v9"]
        assert (await g.ask("GET", "/x")).body == b"/v9/x"
        found[:] = ["127.0.0.1", "127.0.0.2"]
        await until(lambda: len(here(g)) == 2)


async def test_without_upstreams_the_fallback_answers_what_may_be_repeated() -> None:
    small = Upstream(saying(b"small"))
    await small.start()
    async with gateway(upstream=("http://127.0.0.1:1",), fallback=small.url) as g:
        assert (await g.ask("POST", V2, INFER)).body == b"small"
        assert (await g.ask("POST", "/other", INFER)).status == 503
        assert g.metric("requests_total", outcome="refused") == 1
    await small.stop()


async def test_the_fallback_answers_late_requests() -> None:
    small = Upstream(saying(b"small"))
    await small.start()
    stalls = iter([False] * 60 + [True] * 3 + [False] * 100)

    async def serve(request: Request, writer: asyncio.StreamWriter) -> bytes:
        await asyncio.sleep(0.5 if next(stalls) else 0.005)
        return answer(request.body)

    async with gateway(serve, fallback=small.url) as g:
        for _ in range(15):
            await asyncio.gather(*(g.ask("POST", V2, INFER) for _ in range(4)))
        small.requests.clear()
        found = [await g.ask("POST", V2, INFER), await g.ask("POST", "/other", INFER)]
        small.handler = saying(b"{}", 422)
        found.append(await g.ask("POST", V2, INFER))

        assert [one.body for one in found] == [b"small", INFER, INFER]
        assert [one.field("codedinvnet-outcome") for one in found] == ["fallback", "", ""]
        assert g.metric("requests_total", outcome="fallback") >= 1
        assert not any(request.path == "/other" for request in small.requests)
    await small.stop()


async def test_a_mistake_in_a_probe_ends_no_other() -> None:
    """One upstream's probes raise what nobody expects; the other is still found to be silent."""
    mute = Upstream()
    async with gateway(echo, mute) as g:
        assert g.gateway.dispatcher is not None
        watched = g.gateway.dispatcher.cluster
        sound = watched.probe

        async def probe(endpoint: cluster.Endpoint) -> str:
            if endpoint.url == g.upstreams[0].url:
                raise ZeroDivisionError
            return await sound(endpoint)

        watched.probe = probe  # type: ignore[method-assign]
        await asyncio.sleep(1.5)
        mute.is_ready = False
        await until(lambda: up(g, mute.url) == 0, 20.0)
        mute.is_ready = True
        await until(lambda: up(g, mute.url) == 1)
        assert up(g, g.upstreams[0].url) == 1
