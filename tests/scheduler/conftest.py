"""What a test of the scheduler leaves under way is delivered; then nothing may be left."""

from __future__ import annotations

from collections.abc import Generator

import pytest

from tests.scheduler.model import UNDER_WAY


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call() -> Generator[None]:
    UNDER_WAY.clear()
    yield
    for model in list(UNDER_WAY):
        model.drain()
