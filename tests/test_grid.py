"""The experiment grid: cells, rows in files, resuming, and which rows count."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from codedinvnet.common.errors import UserError
from codedinvnet.common.grid import (
    Cell,
    append_row,
    expand,
    failures,
    latest,
    read_rows,
    resume,
    select,
)

PLACE = ["method", "k", "seed"]


def cell(method: str, k: int = 2, seed: int = 1, steps: int = 1, **figures: Any) -> Cell:
    place = {"method": method, "k": k, "seed": seed}
    return Cell("trial", place, {"steps": steps}, lambda: figures)


def row(method: str, k: int = 2, seed: int = 1, steps: int = 1, **figures: Any) -> dict[str, Any]:
    return cell(method, k, seed, steps, **figures).row()


def test_cells_are_measured_once_and_failed_ones_again(tmp_path: Path) -> None:
    path, calls = tmp_path / "new" / "rows.jsonl", []

    def measure(name: str, fails: bool) -> dict[str, Any]:
        calls.append(name)
        if fails and calls.count(name) == 1:
            raise RuntimeError("out of luck")
        return {"value": len(calls)}

    def cells(steps: int = 1) -> list[Cell]:
        return [
            Cell("trial", {"method": n}, {"steps": steps}, lambda n=n: measure(n, n == "b"))  # type: ignore[misc]
            for n in "abc"
        ]

    assert resume(cells(), path) == {"done": 2, "kept": 0, "failed": 1}
    assert [r["error"] for r in read_rows(path)] == [None, "RuntimeError: out of luck", None]
    assert list(failures(read_rows(path), ["method"])["method"]) == ["b"]
    assert resume(cells(), path) == {"done": 1, "kept": 2, "failed": 0}
    assert resume(cells(), path) == {"done": 0, "kept": 3, "failed": 0}
    assert calls == ["a", "b", "c", "b"]
    assert failures(read_rows(path), ["method"]).empty
    assert resume(cells(steps=2), path)["done"] == 3  # other settings are other rows
    for found in read_rows(path):
        assert {"commit", "machine", "began", "seconds", "settings", "version"} <= found.keys()
    with pytest.raises(UserError, match="line 1: a row of 'trial', not of 'other'"):
        resume([Cell("other", {}, {}, dict)], path)


def test_the_newest_row_of_the_newest_version_counts() -> None:
    rows = [
        row("a", seed=1, value=1),
        row("a", seed=2, value=2),
        row("a", seed=1, value=3),
        row("b", seed=1, steps=1, value=4),
        row("b", seed=2, steps=2, value=5),
        {**row("b", seed=2, steps=2), "error": "no luck"},
    ]
    frame = latest(rows, PLACE, repeated=["seed"])
    assert list(zip(frame["method"], frame["seed"], frame["value"], strict=True)) == [
        *(("a", 2, 2), ("a", 1, 3)),
        ("b", 2, 5),  # the first seed has other settings
    ]
    assert latest([], PLACE).empty
    assert list(failures(rows, PLACE)["error"]) == ["no luck"]


AXES = st.dictionaries(
    st.sampled_from("abc"), st.lists(st.integers(0, 4), min_size=1, max_size=3, unique=True)
)


@given(axes=AXES, data=st.data())
def test_only_keeps_what_has_the_values(axes: dict[str, list[int]], data: st.DataObject) -> None:
    places = list(expand(**axes))
    assert len({json.dumps(place) for place in places}) == len(places)
    only = [
        (key, value)
        for key, values in axes.items()
        for value in data.draw(st.lists(st.sampled_from(values), unique=True))
    ]
    found = select(places, [f"{key}={value}" for key, value in only], dict)
    wanted = {key: {v for k, v in only if k == key} for key, _ in only}
    assert found == [p for p in places if all(p[key] in own for key, own in wanted.items())]


@pytest.mark.parametrize(
    ("word", "why"),
    [
        ("k", "--only: 'k' is not KEY=VALUE with a KEY of k, load, method"),
        ("size=2", "is not KEY=VALUE"),
        ("k=3", "the grid has no k=3; its values of k: 2, 10"),
        ("k=ten", "the grid has no k=ten"),
    ],
)
def test_words_that_fit_nothing_are_refused(word: str, why: str) -> None:
    places = list(expand(k=[2, 10], load=[0.4], method=["a"]))
    assert select(places, ["k=10", "load=0.4", "method=a"], dict) == [places[1]]
    with pytest.raises(UserError, match=why):
        select(places, [word], dict)


@pytest.mark.parametrize("whole", [0, 1, 2])
def test_an_interrupted_writer_costs_the_last_line_at_most(tmp_path: Path, whole: int) -> None:
    path = tmp_path / "rows.jsonl"
    for i in range(whole):
        append_row(path, row(str(i)))
    with open(path, "ab") as file:
        file.write((json.dumps(row("x")) + "\n").encode()[:-5])
    kept = [*map(str, range(whole))]
    assert [r["method"] for r in read_rows(path)] == kept
    append_row(path, row("next"))
    assert [r["method"] for r in read_rows(path)] == [*kept, "next"]


@pytest.mark.parametrize("content", [b"my only notes", b"\xff\xfe\x00", b"[1, 2]"])
def test_a_file_of_something_else_is_left_as_it_is(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "notes.txt"
    path.write_bytes(content)
    for act in (lambda: read_rows(path), lambda: append_row(path, row("a"))):
        with pytest.raises(UserError, match=r"notes\.txt does not hold rows: name another file"):
            act()
    assert path.read_bytes() == content


@pytest.mark.parametrize(
    ("line", "why"),
    [("{", "line 2 is not JSON"), ("[]", "schema version None"), ('{"schema_version": 99}', "99")],
)
def test_a_line_that_is_no_row_is_refused(tmp_path: Path, line: str, why: str) -> None:
    path = tmp_path / "rows.jsonl"
    append_row(path, row("a"))
    with open(path, "a") as file:
        file.write(line + "\n")
    with pytest.raises(UserError, match=why):
        read_rows(path)
