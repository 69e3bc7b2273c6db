"""What a row of a load tells of what was asked for."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.load.test_load import Still, exactly

CHANGES: list[dict[str, Any]] = [
    {},
    {"model_version": "2"},
    {"timeout": 7.0},
    {"max_open": 70},
    {"duration": 1.0},
    {"rate": 100.0},
    {"shapes": ("x:FP32:3",)},
    {"header": ("Authorization: Bearer x",)},
]


def test_loads_that_are_asked_for_otherwise_have_other_keys() -> None:
    rows = [exactly(Still(), **change) for change in CHANGES]
    assert len({row["key"] for row in rows}) == len(CHANGES)


def test_a_row_names_headers_without_what_they_say() -> None:
    row = exactly(Still(), header=("Authorization: Bearer secret", "X-Tenant: a"))
    assert row["settings"]["headers"] == ["authorization", "x-tenant"]
    assert "secret" not in json.dumps(row)


@pytest.mark.parametrize("arrivals", ["constant", "poisson", "log"])
def test_the_rate_that_was_asked_for_and_the_one_that_came_of_it(
    arrivals: str, tmp_path: Path
) -> None:
    """Of a log there is none if nobody says."""
    if arrivals == "log":
        arrivals = str(tmp_path / "log")
        Path(arrivals).write_text("5\n5.1\n5.2\n")
    row = exactly(Still(), rate=None, arrivals=arrivals, duration=2.0)
    asked = None if arrivals.endswith("log") else 10.0
    assert (row["settings"]["rate_per_s"], row["settings"]["duration_s"]) == (asked, 2.0)
    assert 4 < row["offered_per_s"] < 25
