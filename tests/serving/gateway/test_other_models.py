"""Upstreams that have another model than the small backup stands for, which is silent then."""

from __future__ import annotations

import asyncio
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from tests.observing import counted, until
from tests.protect.conftest import finished  # noqa: F401
from tests.serving.gateway.fakes import gateway
from tests.serving.gateway.servers import (
    MODEL,
    SMALL,
    Server,
    asked,
    asked_in_json,
    queries,
    scores,
)


def other(inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Another model with the tensors of `vectors`."""
    return {"output": np.roll(MODEL.run(inputs)["output"], 1, axis=1)}


async def unanswered(address: str) -> asyncio.Task[Any]:
    """Send a request that nobody answers yet."""
    late = asyncio.create_task(asked(address, queries(1)))
    done, _ = await asyncio.wait({late}, timeout=0.7)
    assert not done
    return late


CHANGED = SimpleNamespace(signature=MODEL.signature, run=other)


async def test_the_backup_of_another_model_does_not_answer(
    finished: Path,  # noqa: F811
    caplog: pytest.LogCaptureFixture,
) -> None:
    """An upstream is checked again whenever it comes back."""
    server = Server()

    async with gateway(server, protection=finished, deadline_ms=60_000, **SMALL) as (
        address,
        relay,
        _,
    ):

        async def come_back(model: Any) -> None:
            await server.stop()
            meanwhile = asyncio.create_task(asked(address, queries(1)))
            await until(lambda: not relay.pool.places[0].up)
            server.model = model
            await server.start()
            await until(lambda: relay.pool.places[0].up)
            scores(await meanwhile)

        differs = relay.pool.metrics.differs.labels(server.url)
        assert counted(differs) == 0
        await come_back(CHANGED)
        assert counted(differs) == 1
        assert "upstream has another model: the small backup does not answer" in caplog.messages
        server.hold()
        late = await unanswered(address)
        server.go()
        assert scores(await late)[1] == "direct"
        await come_back(MODEL)
        assert counted(differs) == 0
        server.hold()
        assert scores(await asked(address, queries(1)))[1] == "decoded"
        server.go()


async def test_the_backup_of_a_model_with_other_tensors_does_not_answer(
    finished: Path,  # noqa: F811
) -> None:
    """As after an update: the upstream is asked for nothing then, and the backup neither."""
    server = Server()
    before, (output,) = server.metadata, server.metadata["outputs"]
    async with gateway(server, protection=finished, deadline_ms=60_000, **SMALL) as (
        address,
        relay,
        _,
    ):
        differs = relay.pool.metrics.differs.labels(server.url)
        await server.stop()
        assert scores(await asked(address, queries(1)))[1] == "decoded"
        server.metadata = {**before, "outputs": [output, {**output, "name": "more"}]}
        await server.start()
        await until(lambda: counted(differs) == 1)
        late = await unanswered(address)
        await server.stop()
        server.metadata = before
        await server.start()
        assert scores(await late)[1] == "direct"
        assert counted(differs) == 0


async def test_an_upstream_that_comes_back_as_another_server_has_the_same_model(
    finished: Path,  # noqa: F811
) -> None:
    """Its check holds no thread of those that writing in JSON needs."""
    server = Server()

    async with gateway(server, protection=finished, deadline_ms=60_000, **SMALL) as (
        address,
        relay,
        _,
    ):
        asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(1))
        await server.stop()
        assert (await asked_in_json(address, queries(1)))[1] == "decoded"
        await until(lambda: not relay.pool.places[0].up)
        server.takes_binary = False
        await server.start()
        await until(lambda: relay.pool.places[0].up)
        assert counted(relay.pool.metrics.differs.labels(server.url)) == 0
        server.hold()
        assert (await asked_in_json(address, queries(1)))[1] == "decoded"
        server.go()


async def test_each_upstream_is_checked_at_the_start(finished: Path) -> None:  # noqa: F811
    servers = [Server(), Server()]
    servers[1].model = CHANGED  # type: ignore[assignment]

    async with gateway(*servers, protection=finished, deadline_ms=60_000, **SMALL) as (
        address,
        relay,
        _,
    ):
        differs = [relay.pool.metrics.differs.labels(server.url) for server in servers]
        assert [counted(gauge) for gauge in differs] == [0, 1]
        for server in servers:
            server.hold()
        late = await unanswered(address)
        for server in servers:
            server.go()
        assert scores(await late)[1] == "direct"
