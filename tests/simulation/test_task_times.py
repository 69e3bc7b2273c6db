from __future__ import annotations

import json
from pathlib import Path

import pytest

from codedinvnet.errors import UserError
from codedinvnet.serving.times import Times
from codedinvnet.simulation.task_times import read_measured


def test_what_a_service_says(tmp_path: Path) -> None:
    times = Times(3)
    for worker, count in ((0, 100), (2, 300)):
        for value in range(count):
            times.tasks[worker].add((worker + value / 1000) / 1000)
    times.encode.add(0.0005)
    path = tmp_path / "times.json"
    path.write_text(json.dumps(times.report()))
    found = read_measured(path)
    assert [(w.name, w.seen, len(w.times)) for w in found.workers] == [
        ("0", 100, 100),
        ("2", 300, 300),
    ]
    assert found.idle == 1
    assert found.workers[1].times.tolist() == [round(2 + i / 1000, 3) for i in range(300)]
    assert found.encode is not None
    assert found.encode.mean_ms == pytest.approx(0.5)


def test_of_busy_workers_there_is_a_sample(tmp_path: Path) -> None:
    path = tmp_path / "times.json"
    path.write_text(json.dumps({"tasks": [{"seen": 10**6, "ms": [5.0] * 200}], "more": 1}))
    (worker,) = read_measured(path).workers
    assert (worker.seen, len(worker.times)) == (10**6, 200)


def test_lines(tmp_path: Path) -> None:
    path = tmp_path / "tasks.csv"
    lines = [f"{worker}, {ms}" for worker in (10, 2, "gpu a") for ms in range(50)]
    path.write_text("\n".join(["worker,ms", *lines, ""]))
    found = read_measured(path)
    assert [(w.name, w.seen, len(w.times)) for w in found.workers] == [
        ("10", 50, 50),
        ("2", 50, 50),
        ("gpu a", 50, 50),
    ]
    assert found.workers[2].times.tolist() == list(range(50))
    assert (found.encode, found.idle) == (None, 0)


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("t.json", "{", "not JSON"),
        ("t.json", "[]", "no answer of GET /times"),
        ("t.json", '{"service": {}}', "tasks"),
        ("t.json", '{"tasks": []}', "tasks"),
        ("t.json", '{"tasks": [{"seen": 0, "ms": [1]}]}', "seen"),
        ("t.json", '{"tasks": [{"seen": 1, "ms": []}]}', "ms"),
        ("t.json", '{"tasks": [{"seen": 1, "ms": [-1]}]}', "ms"),
        ("t.json", '{"tasks": [null]}', "0 tasks are too few"),
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
    assert (worker.name, worker.seen) == ("a", 100)


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    for name in ("none.json", "none.csv"):
        with pytest.raises(UserError, match="cannot read"):
            read_measured(tmp_path / name)
