"""A gateway whose event loop stands still while upstreams of another thread answer."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

from codedinvnet.serving.gateway.upstream_metrics import FAILED, OK
from tests.observing import counted, until
from tests.serving.gateway.asking import ask, is_up
from tests.serving.gateway.fakes import Fake, gateway

REQUESTS = 6


@contextmanager
def elsewhere(*fakes: Fake) -> Iterator[tuple[str, ...]]:
    """Run upstreams in another thread, and yield their URLs."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    try:
        for fake in fakes:
            asyncio.run_coroutine_threadsafe(fake.start(), loop).result(30)
        yield tuple(fake.url for fake in fakes)
    finally:
        for fake in fakes:
            asyncio.run_coroutine_threadsafe(fake.stop(), loop).result(30)
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()


async def test_what_was_answered_meanwhile_is_not_asked_again() -> None:
    fakes = Fake(), Fake()
    options = {"policy": "uncoded", "hang_timeout_ms": 800, "deadline_ms": 60_000}
    with elsewhere(*fakes) as urls:
        async with gateway(upstream=urls, **options) as (address, relay, _):
            for fake in fakes:
                fake.delay = 0.3
            asked = [asyncio.create_task(ask(address)) for _ in range(REQUESTS)]
            await until(lambda: sum(len(fake.seen) for fake in fakes) == REQUESTS)
            time.sleep(1.2)  # longer than an upstream may be silent
            assert [reply.status for reply in await asyncio.gather(*asked)] == [200] * REQUESTS
            assert sum(len(fake.seen) for fake in fakes) == REQUESTS
            calls = relay.pool.metrics.calls
            for url in urls:
                assert counted(calls.labels(url, OK)) > 0
                assert counted(calls.labels(url, FAILED)) == 0
            assert is_up(relay) == [True, True]
