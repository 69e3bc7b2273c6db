"""Compressed requests: they are unpacked only where that is needed, within the memory's bounds."""

from __future__ import annotations

import asyncio
import gzip
import json
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from starlette.types import Receive

from codedinvnet.models.upstream import described
from codedinvnet.serving.bodies import departure
from codedinvnet.serving.faces.v2 import decompress
from codedinvnet.serving.gateway import calls, http_face
from tests.observing import counted, until
from tests.protect.conftest import finished  # noqa: F401
from tests.protect.factories import FEATURES
from tests.serving.gateway.asking import BODY, ask
from tests.serving.gateway.fakes import GrpcFake, gateway
from tests.serving.gateway.servers import LENGTH, MODEL, SMALL, Server, scores


async def test_packed_requests_hold_what_they_are_unpacked() -> None:
    """Where an upstream speaks the other transport, which has no packed bodies."""
    fake, patient = GrpcFake(), {"deadline_ms": 60_000, "hang_timeout_ms": 50_000}
    fake.delay = 3600

    async with gateway(fake, max_body_memory=1, **patient) as (address, relay, _):
        body = gzip.compress(BODY + b" " * 600_000)
        first = asyncio.create_task(ask(address, body, content_encoding="gzip"))
        await until(lambda: len(fake.seen) == 1)
        assert (await ask(address, body, content_encoding="gzip")).status == 503
        small = asyncio.create_task(ask(address, gzip.compress(BODY), content_encoding="gzip"))
        await until(lambda: len(fake.seen) == 2)
        first.cancel()
        await until(lambda: len(relay.front.waiting) == 1)
        fake.delay = 0
        assert (await ask(address, body, content_encoding="gzip")).status == 200
        bomb = await ask(address, gzip.compress(bytes(3 << 20)), content_encoding="gzip")
        assert (bomb.status, b"more than 1048576 bytes" in bomb.body) == (413, True)
        small.cancel()
        await fake.stop()  # or the gateway would wait for what it is at


async def test_a_request_may_become_no_larger_than_one_may_be() -> None:
    """Each of several is translated in copies, of which no bound on all of them knows."""
    async with gateway(fake := GrpcFake(), max_body=1, max_body_memory=64) as (address, *_):
        bomb = await ask(address, gzip.compress(bytes(3 << 20)), content_encoding="gzip")
        assert (bomb.status, b"more than 1048576 bytes" in bomb.body) == (413, True)
        assert not fake.seen


async def test_packed_requests_are_unpacked_once_and_beside_the_event_loop(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    fakes = GrpcFake(), GrpcFake()
    threads: list[int] = []

    def unpacked(*words: Any) -> bytes:
        threads.append(threading.get_ident())
        return decompress(*words)

    monkeypatch.setattr(calls, "decompress", unpacked)
    async with gateway(*fakes, policy="replicate") as (address, _, _):
        body = gzip.compress(BODY)
        assert (await ask(address, body, content_encoding="gzip")).status == 200
        await until(lambda: all(fake.seen for fake in fakes))
        assert (await ask(address, b"\x1f\x8b", content_encoding="gzip")).status == 400
        assert len(threads) == 2
        assert threading.get_ident() not in threads


async def test_who_leaves_while_a_request_is_unpacked_waits_for_the_thread(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Its turn is had until then, and its memory taken."""
    begun, may_end = threading.Event(), threading.Event()

    def unpacked(*_: Any) -> bytes:
        begun.set()
        may_end.wait(30.0)
        return b""

    monkeypatch.setattr(calls, "decompress", unpacked)
    call = calls.Call("m", "", "http", b"", (("content-encoding", "gzip"),), 0.0)
    waits = asyncio.create_task(call.unpacked())
    await asyncio.to_thread(begun.wait, 30.0)
    waits.cancel()
    await asyncio.sleep(0.05)
    assert not waits.done()
    may_end.set()
    with pytest.raises(asyncio.CancelledError):
        await waits


async def test_what_its_client_has_left_before_its_turn_is_sent_to_nobody(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    fake, may_go_on = GrpcFake(), threading.Event()
    here: list[bytes] = []
    gone: list[bytes] = []

    def unpacked(*words: Any) -> bytes:
        assert may_go_on.wait(30.0)
        return decompress(*words)

    async def leaves(receive: Receive) -> None:
        here.append(b"")
        await departure(receive)
        gone.append(b"")

    monkeypatch.setattr(calls, "decompress", unpacked)
    monkeypatch.setattr(http_face, "departure", leaves)
    async with gateway(fake) as (address, relay, _):
        body = gzip.compress(BODY)
        stays = asyncio.create_task(ask(address, body, content_encoding="gzip"))
        await until(lambda: len(here) == 1)
        leaver = asyncio.create_task(ask(address, body, content_encoding="gzip"))
        await until(lambda: len(here) == 2)
        leaver.cancel()
        await until(lambda: len(gone) == 1)
        may_go_on.set()
        assert (await stays).status == 200
        await until(lambda: counted(relay.front.metrics.requests.labels("499")) == 1)
        assert len(fake.seen) == 1


async def test_packed_requests_are_read_and_hold_what_they_are_unpacked(finished: Path) -> None:  # noqa: F811
    server, rows = Server(), 200
    head, blobs = described({"x": np.zeros((rows, FEATURES), np.float32)}, MODEL.signature.inputs)
    body, packed = gzip.compress(b"".join([head, *blobs])), {"content_encoding": "gzip"}
    packed[LENGTH] = str(len(head))
    memory = 1.5 * rows * FEATURES * 4 / 2**20

    async with gateway(
        server, protection=finished, max_body_memory=memory, deadline_ms=20000, **SMALL
    ) as (address, relay, _):
        server.hold()
        assert scores(await ask(address, body, **packed))[1] == "decoded"
        told = json.loads(head)
        told["parameters"]["accept_decoded"] = False
        exact = json.dumps(told).encode()
        packed[LENGTH] = str(len(exact))
        body = gzip.compress(b"".join([exact, *blobs]))
        waits = asyncio.create_task(ask(address, body, **packed))
        await until(lambda: len(relay.front.waiting) == 1)
        assert (await ask(address, body, **packed)).status == 503
        server.go()
        await waits
        await until(lambda: not relay.front.waiting)
        large = await ask(address, gzip.compress(bytes(1 << 20)), **packed)
        assert large.headers["codedinvnet-outcome"] == "failed"  # the upstream's own error
