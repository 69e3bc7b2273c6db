"""What tests see of a running service: its metrics, and conditions that they wait for."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

import pytest
from prometheus_client import Counter, Gauge


def counted(metric: Counter | Gauge) -> float:
    """Return the value of a metric without labels, or with all of them given."""
    (family,) = metric.collect()
    (value,) = (s.value for s in family.samples if not s.name.endswith("_created"))
    return value


async def until(condition: Callable[[], bool], seconds: float = 30.0) -> None:
    """Wait until a condition holds; fail if it does not in so many seconds."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        await asyncio.sleep(0.005)


def set_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the environment name a proxy for all addresses, at which nobody listens."""
    for name in ("no_proxy", "NO_PROXY", "HTTP_PROXY", "HTTPS_PROXY"):
        monkeypatch.delenv(name, raising=False)
    for name in ("http_proxy", "https_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:1")
