from __future__ import annotations

import os
from pathlib import Path

import pytest

from codedinvnet.serving.opened import usable_processors


@pytest.mark.parametrize(
    ("told", "count"),
    [("max 100000", 8), ("250000 100000", 3), ("50000 100000", 1), ("6400000 100000", 8), ("", 8)],
)
def test_processors_are_those_that_a_container_has(
    told: str, count: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)), raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 64)
    (tmp_path / "cpu.max").write_text(f"{told}\n")
    assert usable_processors(tmp_path / "cpu.max") == count
    assert usable_processors(tmp_path / "nowhere") == 8
    monkeypatch.delattr(os, "sched_getaffinity")
    assert usable_processors(tmp_path / "nowhere") == 64
