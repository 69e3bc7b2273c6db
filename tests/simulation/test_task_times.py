from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from codedinvnet.errors import UserError
from codedinvnet.simulation.task_times import read_measured
from tests.simulation import recording
from tests.simulation.scenarios import scenario

SEEN = recording.traffic(scenario(workers=5, k=4, queries=4))


def traffic(tasks: list[list[float]], rules: dict[str, Any] | None = None, **changes: Any) -> str:
    """Return what a service says that has done these tasks, and whose settings are others."""
    told = {**SEEN["rules"], "workers": 3, **(rules or {})}
    return json.dumps({**SEEN, "rules": told, "encode_share": 0.1, "tasks": tasks, **changes})


FULL: list[list[float]] = [[i, 0, 0, 40.0, 0] for i in range(200)]
"""Tasks that can be fitted."""


def test_what_a_service_says(tmp_path: Path) -> None:
    """Data tasks, with what held their answers back."""
    tasks: list[list[float]] = [[i, 2, 0, 40.0, i] for i in range(300)]
    tasks += [[i, 0, 0, 50.0, 0] for i in range(100)] + [[9, 1, 4, 70.0, 0]]
    path = tmp_path / "traffic.json"
    path.write_text(traffic(tasks))
    found = read_measured(path)
    assert [(w.name, len(w.times)) for w in found.workers] == [("0", 100), ("2", 300)]
    assert (found.idle, found.encode_share) == (1, 0.1)
    assert found.workers[1].times.tolist() == [40.0 + i for i in range(300)]


def test_what_a_run_is_told_to_be(tmp_path: Path) -> None:
    """All that `GET /traffic` says, and not only what is needed."""
    path = tmp_path / "traffic.json"
    given = scenario(workers=6, k=4, queries=400, qps=50, policy="coded", service=20, encode=2)
    path.write_text(json.dumps(recording.traffic(given)))
    found = read_measured(path)
    assert sum(len(worker.times) for worker in found.workers) >= 400
    assert {*np.concatenate([w.times for w in found.workers]).round(6)} == {20.0}
    assert found.encode_share == pytest.approx(0.1)


def test_encoding_that_nobody_knows(tmp_path: Path) -> None:
    """An answer says null, or nothing at all; 0 is a code that encodes nothing."""
    path = tmp_path / "traffic.json"
    raw = json.loads(traffic(FULL))
    for share in (None, 0.0):
        path.write_text(json.dumps({**raw, "encode_share": share}))
        assert read_measured(path).encode_share == share
    del raw["encode_share"]
    path.write_text(json.dumps(raw))
    assert read_measured(path).encode_share is None


def test_lines(tmp_path: Path) -> None:
    path = tmp_path / "tasks.csv"
    lines = [f"{worker}, {ms}" for worker in (10, 2, "gpu a") for ms in range(50)]
    path.write_text("\n".join(["worker,ms", *lines, ""]))
    found = read_measured(path)
    assert [(w.name, len(w.times)) for w in found.workers] == [("10", 50), ("2", 50), ("gpu a", 50)]
    assert found.workers[2].times.tolist() == list(range(50))
    assert (found.encode_share, found.idle) == (None, 0)


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("t.json", "{", "not JSON"),
        ("t.json", "[]", "no answer of GET /traffic"),
        ("t.json", '{"service": {}}', "no answer of GET /traffic, or one of another release"),
        ("t.json", traffic(FULL, schema_version=1), "or one of another release"),
        ("t.json", traffic(FULL, kind="times"), "no answer of GET /traffic"),
        ("t.json", traffic(FULL, rules={"workers": "x"}), r"GET /traffic: rules\.workers"),
        ("t.json", traffic([[0, 0, 0, -1, 0]]), "tasks"),
        ("t.json", traffic([[0, 0, 0, 1]]), "tasks"),
        ("t.json", traffic([], rules={"slots": 0}), "slots"),
        ("t.json", traffic([]), "0 tasks are too few"),
        ("t.json", traffic([[0, 0, 4, 1, 0]]), "0 tasks are too few"),
        ("t.json", traffic(FULL, rules={"worker_batch": 8}), "no fit with --worker-batch 8"),
        ("t.json", traffic(FULL, rules={"backups": 1}), "no fit where a small backup has workers"),
        ("t.csv", "1,0\n" * 60 + "1,5\n" * 50, "more than half of the tasks took 0 ms"),
        ("t.csv", "1,5\n" * 99 + "1,1e307\n", r"a task took 1e\+307 ms, which is more than a day"),
        ("t.csv", "1,5\n" * 99, "99 tasks are too few to fit: 100 at least"),
        ("t.csv", "1,5\nworker,ms\n", "line 2: 'worker,ms' is not worker,ms"),
        ("t.csv", "1,5\n2;5\n", "line 2: '2;5' is not worker,ms"),
        ("t.csv", "1,-5\n", "line 1"),
        ("t.csv", "1,nan\n", "line 1"),
        ("t.csv", "1,inf\n", "line 1"),
    ],
)
def test_refusals(name: str, text: str, words: str, tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_text(text)
    with pytest.raises(UserError, match=words) as caught:
        read_measured(path)
    assert "\n" not in str(caught.value)


def test_a_spreadsheets_csv(tmp_path: Path) -> None:
    path = tmp_path / "TIMES.CSV"
    path.write_text("worker,ms\n" + "a,5\n" * 100, encoding="utf-8-sig")
    (worker,) = read_measured(path).workers
    assert (worker.name, len(worker.times)) == ("a", 100)


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    for name in ("none.json", "none.csv"):
        with pytest.raises(UserError, match="cannot read"):
            read_measured(tmp_path / name)
