"""The requests of a load, before they are sent."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from codedinvnet.load import requests
from codedinvnet.load.requests import from_file, generated
from codedinvnet.models.base import Signature, TensorSpec

VECTORS = Signature((TensorSpec("x", "FP32", (8,)), TensorSpec("y", "INT64", (2,))), ())
SIZE = 4 * 8 + 8 * 2
"""Bytes of a query."""


@pytest.mark.parametrize(
    ("batch", "most", "kept"),
    [(1, 1000 * SIZE, 64), (1, 10 * SIZE, 10), (3, 10 * SIZE, 3), (3, SIZE, 1)],
)
def test_generated_requests_are_fewer_where_they_are_large(
    batch: int, most: int, kept: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(requests, "MOST_BYTES", most)
    found = generated(VECTORS, batch, 0)
    assert len(found) == kept
    assert {array.shape for array in found[-1].values()} == {(batch, 8), (batch, 2)}
    assert len({request["x"].tobytes() for request in found}) == kept


@pytest.mark.parametrize(("most", "kept"), [(1000, 6), (10, 3), (1, 1)])
def test_requests_of_a_file_are_fewer_where_they_are_large(
    most: int, kept: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    x, y = np.arange(160, dtype=np.float32).reshape(20, 8), np.arange(40).reshape(20, 2)
    np.savez(tmp_path / "queries.npz", x=x, y=y)
    monkeypatch.setattr(requests, "MOST_BYTES", most * SIZE)
    assert len(from_file(tmp_path / "queries.npz", VECTORS, 3, 0)) == kept
