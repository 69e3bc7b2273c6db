from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks import serve_load
from benchmarks.serve_load import Loader
from codedinvnet.bench.load import Reply
from codedinvnet.errors import UserError


class Loaded:
    """Stands in for the service: p99 is what `tails` says, try after try."""

    def __init__(self, loader: Loader, tails: Iterable[float]) -> None:
        self.rates: list[float] = []
        self.tails = iter(tails)

        async def load(client: Any, *, rate: float, count: int, **_: Any) -> list[Reply]:
            self.rates.append(round(rate, 3))
            return [Reply("q", (0,), next(self.tails), 200)] * count

        @asynccontextmanager
        async def there(*_: Any, **__: Any) -> AsyncIterator[Any]:
            yield self

        self.load, self.there, self.address = load, there, ""
        loader.load = load  # type: ignore[method-assign]

    async def infer(self, *_: Any) -> Reply:
        return Reply("q", (0,), 0.01, 200)


@pytest.fixture
def searched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    def search(tails: Iterable[float]) -> tuple[float | str, list[float]]:
        images = np.zeros((1, 1, 28, 28), np.uint8)
        loader = Loader("mnist", "mnist", images, 0, tmp_path / "log", capacity_seconds=1.0)
        loaded = Loaded(loader, tails)
        monkeypatch.setattr(serve_load, "server", loaded.there)
        monkeypatch.setattr(serve_load, "connect", loaded.there)
        try:
            return asyncio.run(loader._capacity(1)), loaded.rates
        except UserError as error:
            return str(error), loaded.rates

    return search


def test_a_rate_that_failed_once_is_tried_again(searched: Callable[..., Any]) -> None:
    good, bad = 0.01, 0.2
    capacity, rates = searched([good, bad, good, bad, bad])
    assert capacity == 62.5
    assert rates == [50, 62.5, 62.5, 78.125, 78.125]


def test_a_service_that_keeps_nothing_up_is_given_up(searched: Callable[..., Any]) -> None:
    told, rates = searched(itertools.repeat(0.2))
    assert "does not keep up with 0.39 requests of 1 images a second" in told
    assert "5 times the 10.0 ms" in told
    assert len(rates) == 2 * (serve_load.REDUCTIONS + 1)


def test_a_service_that_answers_with_errors_is_not_measured(tmp_path: Path) -> None:
    loader = Loader("runs/mine", "mnist", np.zeros((1, 1, 28, 28), np.uint8), 0, tmp_path, 1.0)

    class Wrong:
        async def infer(self, *_: Any) -> Reply:
            return Reply("q", (0,), 0.01, 404)

    with pytest.raises(UserError, match="answered a first request with 404"):
        asyncio.run(loader.warm(Wrong()))  # type: ignore[arg-type]
