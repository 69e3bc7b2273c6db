from __future__ import annotations

import asyncio
from collections.abc import Sequence

import numpy as np
import pytest

from codedinvnet.evaluation.client import Client, Reply
from codedinvnet.simulation.arrivals import poisson_gaps


class Clock(Client):
    """Sends nothing, and takes down when each request was due."""

    async def infer(self, identity: str, rows: Sequence[int], due: float | None = None) -> Reply:
        assert due is not None
        await asyncio.sleep(0.001 * rows[0])  # later requests are answered first
        return Reply(identity, tuple(rows), due, status=200)


def test_requests_are_due_as_the_simulator_repeats_them() -> None:
    """And replies are in the order of the requests."""

    async def load(seed: int) -> list[Reply]:
        client = Clock("http://nowhere", "m", np.zeros((60, 1)))
        requests = [[60 - i] for i in range(50)]
        return await client.load(requests, rate=2000, seed=seed, label="test")

    replies = asyncio.run(load(1))
    assert [(r.identity, r.rows) for r in replies] == [(f"test {i}", (60 - i,)) for i in range(50)]
    dues = [reply.latency - replies[0].latency for reply in replies]
    gaps = poisson_gaps(2000, 50, 1)
    assert dues == pytest.approx([sum(gaps[1 : i + 1]) for i in range(50)], abs=1e-6)
    other = asyncio.run(load(2))
    assert dues != pytest.approx([r.latency - other[0].latency for r in other], abs=1e-3)
