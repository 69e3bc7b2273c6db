"""Tests that are coroutines run on uvloop, as the gateway does."""

from __future__ import annotations

import time

import pytest

from tests.clock import Clock


@pytest.fixture
def anyio_backend() -> tuple[str, dict[str, bool]]:
    return "asyncio", {"use_uvloop": True}


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    found = Clock()
    monkeypatch.setattr(time, "monotonic", found)
    return found
