"""The benchmark of processor time runs, and finds both servers."""

from pathlib import Path

import pytest

from benchmarks import processor

pytestmark = pytest.mark.nightly


def test_both_servers_are_measured() -> None:
    rows = processor.run(tree=[Path()], requests=80)["rows"]
    assert {row["of"] for row in rows} == set(processor.PATHS)
    assert all(0 < row["from"] <= row["ms of a core"] <= row["to"] for row in rows)


def test_members_are_measured() -> None:
    rows = processor.run(tree=[Path()], requests=80, members=True)["rows"]
    assert len(rows) == 4
    assert all(0 <= row["from"] <= row["ms of a core"] <= row["to"] for row in rows)
