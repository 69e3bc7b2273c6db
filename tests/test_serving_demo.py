"""The demonstration's table, and the whole of it in short."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from codedinvnet import serving_demo
from codedinvnet.evaluation.client import Reply
from codedinvnet.serving_demo import table
from tests.processes import needs_proc


def reply(row: int, label: int, outcome: str, latency: float) -> Reply:
    labels = np.array([label], np.int64)
    return Reply("query", (row,), latency, 200, labels=labels, outcomes=(outcome,))


def test_the_table_counts_by_outcome() -> None:
    replies = [
        reply(0, 7, "direct", 0.010),
        reply(1, 3, "direct", 0.020),  # wrong
        reply(2, 1, "decoded", 0.050),
        reply(4, 5, "guessed", 0.070),
        Reply("query", (3,), 1.0, 503, error="overloaded"),
    ]
    lines = table(replies, np.array([7, 2, 1, 0, 6])).splitlines()
    assert [line.split()[:3] for line in lines[1:]] == [
        ["direct", "2", "50.0%"],
        ["decoded", "1", "100.0%"],
        ["guessed", "1", "0.0%"],
        ["failed", "1", "0.0%"],
    ]
    assert lines[2].split()[3:] == ["50.0", "50.0"]


@needs_proc
def test_a_service_with_slow_tasks_and_a_killed_worker_answers_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(serving_demo, "QUERIES", 120)
    monkeypatch.setattr(serving_demo, "SLOW_MS", 600.0)  # much, on a machine that is busy, too
    monkeypatch.setattr(serving_demo, "KILLED_AFTER", 0.3)
    serving_demo.run_serving_demo("mnist", tmp_path)
    told = capsys.readouterr().out.splitlines()
    counts = {words[0]: int(words[1]) for words in map(str.split, told[-4:])}
    assert counts["direct"] + counts["decoded"] + counts["guessed"] == 120
    assert counts["decoded"] >= 1
    assert counts["failed"] == 0
    assert "worker lost" in (tmp_path / "serve.log").read_text()


def test_what_did_not_happen_is_a_zero() -> None:
    lines = table([reply(0, 7, "direct", 0.01)], np.array([7])).splitlines()
    assert [line.split() for line in lines[2:]] == [
        [outcome, "0"] for outcome in ("decoded", "guessed", "failed")
    ]
