from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from codedinvnet.errors import UserError
from codedinvnet.serving.times import Times
from codedinvnet.simulation.task_times import SAMPLE, read_measured


def served(path: Path, counts: list[int]) -> Path:
    """Write what a service says whose worker w took w + 1 to w + 2 ms."""
    times = Times(len(counts))
    for worker, count in enumerate(counts):
        for value in np.linspace(worker + 1, worker + 2, count):
            times.tasks[worker].add(value / 1000)
            times.service.add(value / 1000)
    times.encode.add(0.0005)
    path.write_text(json.dumps(times.report()))
    return path


def test_what_a_service_says(tmp_path: Path) -> None:
    found = read_measured(served(tmp_path / "times.json", [100, 0, 300]))
    assert [len(sample) for sample in found.workers] == [100, 0, 300]
    assert found.workers[0].mean() == pytest.approx(1.5, rel=0.01)
    assert found.workers[2].mean() == pytest.approx(3.5, rel=0.01)
    assert found.workers[2].max() <= 4
    assert found.encode is not None
    assert found.encode.mean_ms == pytest.approx(0.5)


def test_busy_services_are_looked_at_in_part(tmp_path: Path) -> None:
    path = served(tmp_path / "times.json", [200, 100])
    raw = json.loads(path.read_text())
    raw["tasks"][0]["seen"], raw["tasks"][1]["seen"] = 3 * SAMPLE, SAMPLE
    path.write_text(json.dumps(raw))
    assert [len(x) for x in read_measured(path).workers] == [0.75 * SAMPLE, 0.25 * SAMPLE]


def test_lines(tmp_path: Path) -> None:
    path = tmp_path / "tasks.csv"
    lines = [f"{worker}, {ms}" for worker in (10, 2, 1) for ms in range(50)]
    path.write_text("\n".join(["worker,ms", *lines, ""]))
    found = read_measured(path)
    assert [len(sample) for sample in found.workers] == [50, 50, 50]  # 1, 2, 10
    assert found.encode is None
    path.write_text("\n".join([*lines, "gpu-b,7", "gpu-a,5"]))
    found = read_measured(path)
    assert [sample[0] for sample in found.workers[3:]] == [5, 7]


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("t.json", "{", "not JSON"),
        ("t.json", "[]", "no answer of GET /times"),
        ("t.json", '{"service": {}}', "tasks"),
        ("t.json", '{"tasks": []}', "tasks"),
        ("t.json", '{"tasks": [{"seen": 0, "times": 1}]}', "seen"),
        ("t.json", '{"tasks": [{"seen": 200, "times": {"ms": 4}}]}', "must be an empirical"),
        ("t.json", '{"tasks": [null]}', "0 tasks are too few"),
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
    with pytest.raises(UserError, match=words.replace("(", r"\(")) as caught:
        read_measured(path)
    assert "\n" not in str(caught.value)


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    for name in ("none.json", "none.csv"):
        with pytest.raises(UserError, match="cannot read"):
            read_measured(tmp_path / name)
