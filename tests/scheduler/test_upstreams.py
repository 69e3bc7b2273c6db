"""Hedging in front of servers that queue what they are given: it must help, and never hurt."""

from __future__ import annotations

from dataclasses import replace

import pytest

from tests.scheduler.upstreams import Cell, Found, Run


def run(cell: Cell, policy: str = "hedge") -> Found:
    return Run(replace(cell, policy=policy)).run()


@pytest.mark.parametrize(("busy", "slots"), [(0.4, 1), (0.4, 2), (0.4, 4), (0.52, 2)])
def test_a_server_that_was_blocked_is_used_again(busy: float, slots: int) -> None:
    """With several slots one block delays several requests; that does not make a server slow."""
    cell = Cell("block", busy, slots=slots)
    hedge, queue = run(cell), run(cell, "queue")
    assert hedge.quantile(0.5) < 1.15 * queue.quantile(0.5)
    assert hedge.quantile(0.9) < 1.15 * queue.quantile(0.9)
    assert hedge.quantile(0.99) < 0.5 * queue.quantile(0.99)
    assert hedge.quantile(0.999) < 0.2 * queue.quantile(0.999)
