from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from codedinvnet.codes.method import PARTS
from codedinvnet.errors import UserError
from codedinvnet.rows import (
    OWN,
    PLACES,
    SCHEMA_VERSION,
    agreeing,
    append_row,
    current_accuracy,
    current_latency,
    is_latency_row,
    key_of,
    measured_row,
    newest,
    read_rows,
)
from tests.evaluation import canned


def row(key: str, value: int = 0) -> dict[str, object]:
    return {"schema_version": SCHEMA_VERSION, "key": key, "value": value}


def test_rows_are_appended_and_read(tmp_path: Path) -> None:
    path = tmp_path / "new" / "rows.jsonl"
    assert read_rows(path) == []
    append_row(path, row("a", 1))
    append_row(path, row("b", 2))
    assert read_rows(path) == [row("a", 1), row("b", 2)]


@pytest.mark.parametrize("whole", [0, 1, 2])
def test_an_unfinished_line_is_ignored_and_cut_off(tmp_path: Path, whole: int) -> None:
    path = tmp_path / "rows.jsonl"
    for i in range(whole):
        append_row(path, row(str(i)))
    with open(path, "ab") as file:
        file.write(json.dumps(row("x")).encode()[:-5])
    assert [r["key"] for r in read_rows(path)] == [str(i) for i in range(whole)]
    append_row(path, row("next"))
    assert [r["key"] for r in read_rows(path)] == [*map(str, range(whole)), "next"]


@pytest.mark.parametrize("whole", [0, 1, 2])
def test_a_last_row_that_lacks_its_newline_alone_is_read_and_kept(
    tmp_path: Path, whole: int
) -> None:
    path = tmp_path / "rows.jsonl"
    for i in range(whole):
        append_row(path, row(str(i)))
    append_row(path, row("last"))
    path.write_bytes(path.read_bytes().removesuffix(b"\n"))
    expected = [*map(str, range(whole)), "last"]
    assert [r["key"] for r in read_rows(path)] == expected
    append_row(path, row("next"))
    assert [r["key"] for r in read_rows(path)] == [*expected, "next"]
    assert path.read_bytes().count(b"\n") == whole + 2


@pytest.mark.parametrize("rest", ["7", "{}{", '"words"', "\u00e4"])
def test_what_is_no_row_behind_the_last_newline_is_ignored(tmp_path: Path, rest: str) -> None:
    path = tmp_path / "rows.jsonl"
    append_row(path, row("a"))
    with open(path, "ab") as file:
        file.write(rest.encode("latin-1"))
    assert read_rows(path) == [row("a")]
    append_row(path, row("b"))
    assert read_rows(path) == [row("a"), row("b")]


@pytest.mark.parametrize("content", [b"my only notes", b"\xff\xfe\x00", b"[1, 2]"])
def test_a_file_of_something_else_is_left_as_it_is(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "notes.txt"
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"notes\.txt does not hold rows: name another file"):
        read_rows(path)
    with pytest.raises(UserError, match="does not hold rows"):
        append_row(path, row("a"))
    assert path.read_bytes() == content


@pytest.mark.parametrize(
    ("line", "told"),
    [("{", "line 2 is not JSON"), ("[]", "schema version None"), ('{"schema_version": 99}', "99")],
)
def test_other_lines_are_told(tmp_path: Path, line: str, told: str) -> None:
    path = tmp_path / "rows.jsonl"
    append_row(path, row("a"))
    with open(path, "a") as file:
        file.write(line + "\n")
    with pytest.raises(UserError, match=told):
        read_rows(path)


def test_rows_of_another_benchmark_are_told(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    place = dict.fromkeys(PLACES["accuracy"], 1)
    trial = {**row("a"), **place, "settings": {"quick": False}, "error": None}
    append_row(path, {**trial, "benchmark": "accuracy"})
    append_row(path, {**row("b"), "kind": "latency"})
    assert len(read_rows(path)) == 2
    with pytest.raises(UserError, match=r"rows\.jsonl, line 2: a row of latency, not of bench acc"):
        read_rows(path, "accuracy")
    with pytest.raises(UserError, match=r"line 1: a row of accuracy, not of bench latency"):
        read_rows(path, "latency")
    append_row(tmp_path / "other.jsonl", row("a"))
    with pytest.raises(UserError, match="line 1: a row of something else"):
        read_rows(tmp_path / "other.jsonl", "latency")


@pytest.mark.parametrize(
    ("more", "lacks"),
    [
        ({}, "settings"),
        ({"settings": None}, "settings"),
        ({"settings": {}, "key": 7}, "key"),
        ({"settings": {}}, "error"),
        ({"settings": {}, "error": None}, "dataset"),
        ({"settings": {}, "error": None, **dict.fromkeys(PLACES["latency"], 1)}, "settings.quick"),
    ],
)
def test_a_row_that_is_no_trial_is_told(tmp_path: Path, more: dict[str, Any], lacks: str) -> None:
    path = tmp_path / "rows.jsonl"
    append_row(path, {**row("a"), "kind": "latency", **more})
    with pytest.raises(UserError, match=f"line 1: a row of bench latency without {lacks}"):
        read_rows(path, "latency")


def test_a_folder_is_no_file_of_rows(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot read the rows in"):
        read_rows(tmp_path)


def test_an_error_is_a_row_too() -> None:
    def fail() -> dict[str, Any]:
        raise RuntimeError("out of luck")

    good = measured_row({"key": "a"}, lambda: {"value": 3})
    bad = measured_row({"key": "a"}, fail)
    assert (good["value"], good["error"]) == (3, None)
    assert bad["error"] == "RuntimeError: out of luck"
    assert "value" not in bad
    for one in (good, bad):
        assert one["schema_version"] == SCHEMA_VERSION
        assert one["key"] == "a"
        assert one["seconds"] >= 0
        assert {"commit", "machine", "began"} <= one.keys()


def test_the_newest_row_of_a_trial_counts() -> None:
    rows = [row("a", 1), row("b", 2), row("a", 3)]
    assert list(newest(rows).values()) == [row("b", 2), row("a", 3)]


def test_keys_differ_with_what_they_are_of() -> None:
    assert key_of({"a": 1, "b": 2}) == key_of({"b": 2, "a": 1})
    assert len({key_of({"a": 1}), key_of({"a": 2}), key_of({"a": 1}, {}), key_of("a")}) == 4


def test_rows_that_were_made_otherwise_than_the_last_of_their_place_are_left_out() -> None:
    rows = [{"at": "a", "of": 1}, {"at": "b", "of": 1}, {"at": "a", "of": 2}, {"at": "a", "of": 2}]
    found = agreeing(rows, lambda row: row["at"], lambda row: row["of"])
    assert found == rows[1:]
    assert agreeing(rows[:3], lambda row: None, lambda row: row["of"]) == rows[2:3]


MS = np.arange(50.0, 150.0)


def test_accuracy_of_older_settings_does_not_count() -> None:
    rows = [canned.row("parm", 0.2, seed=seed, epochs=1) for seed in (1, 2)]
    rows += [canned.row("parm", 0.6, seed=1, epochs=9)]
    assert current_accuracy(rows) == rows[2:]


@pytest.mark.parametrize(
    "changed", [{"epochs": 9}, {"patterns": 300}, {"test_images": 9}, {"weights": "other"}]
)
def test_a_trial_that_failed_does_not_remove_what_was_measured(changed: dict[str, Any]) -> None:
    """It is told beside it, until it was measured as well."""
    place: dict[str, Any] = {"dataset": "elsewhere"}
    good = [canned.row(label, 0.9, **place) for label in ("none", "parm")]
    failed = canned.row("parm", 0.0, **place | changed, error="RuntimeError: out of luck")
    assert current_accuracy([*good, failed]) == [*good, failed]
    done = canned.row("parm", 0.8, **place | changed)
    assert good[1] not in current_accuracy([*good, failed, done])


@pytest.mark.parametrize("name", ["test_digest", "train_digest"])
def test_accuracy_on_other_images_is_not_compared(name: str) -> None:
    before: dict[str, Any] = {name: "before"}
    rows = [canned.row(label, 0.9, **before) for label in ("none", "parm")]
    assert current_accuracy(rows) == rows
    now: dict[str, Any] = {name: "now"}
    last = canned.row("parm", 0.8, **now)
    assert current_accuracy([*rows, last]) == [last]


def test_accuracy_of_another_version_of_a_method_does_not_count() -> None:
    """Whether or not it was measured anew; of methods that are not known here any version does."""
    own = canned.row("collage", 0.9)
    older = canned.row("collage", 0.8, version=1)
    newer = canned.row("parm", 0.8, version=9)
    tuned = canned.row("nercc", 0.8, tuning={"candidates": [0.0], "patterns": 100})
    unknown = canned.row("mine", 0.7, version=3)
    assert current_accuracy([own, older, newer, tuned, unknown]) == [own, unknown]


def test_accuracy_of_other_weights_than_those_that_ship_does_not_count() -> None:
    shipped, other = canned.row("parm", 0.9), canned.row("none", 0.8, weights="before")
    elsewhere = canned.row("parm", 0.9, dataset="elsewhere", weights="before")
    assert current_accuracy([shipped, other, elsewhere]) == [shipped, elsewhere]
    assert current_accuracy([other]) == []


def test_a_settings_number_of_patterns_concerns_samples_of_that_setting_alone() -> None:
    one = [canned.row("coded-invnet", 0.93), canned.row("parm", 0.5, k=4)]
    three = [canned.row(label, 0.71, missing=3) for label in ("coded-invnet", "nercc")]
    new = canned.row("coded-invnet", 0.75, missing=3, patterns=300)  # all of them
    newest = canned.row("parm", 0.5, missing=3, patterns=100)
    assert current_accuracy([*one, *three]) == [*one, *three]
    assert current_accuracy([*one, *three, new]) == [*one, three[1], new]
    assert current_accuracy([*one, *three, new, newest]) == [*one, new, newest]


def test_a_trial_that_was_run_again_counts_once() -> None:
    failed, done = canned.row("parm", 0.0, error="RuntimeError: no"), canned.row("parm", 0.5)
    assert failed["key"] == done["key"]
    assert current_accuracy([failed, done]) == [done]


@pytest.mark.parametrize(
    "changed", [{"held_ms": 50.0}, {"machine": "another"}, {"cores": 8}, {"wait_ms": 1.0}]
)
def test_latencies_that_were_measured_otherwise_are_not_pooled(changed: dict[str, Any]) -> None:
    rows = [canned.latency_row("coded", MS, run=run) for run in (1, 2)]
    last = canned.latency_row("coded", MS, run=3, **changed)
    assert current_latency([*rows, last]) == [last]


def test_the_threads_of_the_process_that_sends_are_no_other_machine() -> None:
    machines = [f"box, {threads}, Python 3" for threads in ("2 threads", "1 threads", "1 thread")]
    rows = [
        canned.latency_row("coded", MS, run=run, machine=machine)
        for run, machine in enumerate(machines)
    ]
    assert current_latency(rows) == rows


def test_quick_latencies_count_where_a_data_set_has_no_others() -> None:
    rows = [canned.latency_row("coded", MS), canned.latency_row("coded", MS, run=2, quick=True)]
    assert current_latency(rows) == rows[:1]
    assert current_latency(rows[1:]) == rows[1:]


def test_rows_of_methods_with_parts_of_different_kinds_belong_together() -> None:
    rows = [canned.latency_row(label, MS) for label in ("coded", "small-backup", "parm", "mine")]
    rows[2]["settings"]["parity"] = {"epochs": 1}
    rows[3]["settings"]["method"] = {"digest": "0af1"}
    assert current_latency(rows) == rows


def test_every_kind_of_part_is_a_methods_own_setting() -> None:
    assert {*PARTS} <= {*OWN}


def test_a_table_has_a_method_of_ones_own_as_its_file_is_now() -> None:
    before, now = (
        [canned.row("mine", 0.9, k=k) | {"key": f"{digest}{k}"} for k in (2, 4)]
        for digest in ("a", "b")
    )
    for digest, rows in (("a", before), ("b", now)):
        for row in rows:
            row["settings"] = {**row["settings"], "method": digest}
    assert current_accuracy([*before, now[1]]) == [now[1]]


def test_rows_of_somebody_else_are_told_apart() -> None:
    own = canned.latency_row("coded", MS)
    assert is_latency_row(own)
    assert not is_latency_row({**own, "settings": {}})
    assert not is_latency_row({name: own[name] for name in own if name != "cores"})
