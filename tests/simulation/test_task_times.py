from __future__ import annotations

from pathlib import Path

import pytest

from codedinvnet.errors import UserError
from codedinvnet.simulation.task_times import read_measured


def test_lines(tmp_path: Path) -> None:
    path = tmp_path / "tasks.csv"
    lines = [f"{worker}, {ms}" for worker in (10, 2, "gpu a") for ms in range(50)]
    path.write_text("\n".join(["worker,ms", *lines, ""]))
    found = read_measured(path)
    assert [(w.name, len(w.times)) for w in found] == [("10", 50), ("2", 50), ("gpu a", 50)]
    assert found[2].times.tolist() == list(range(50))


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
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
    (worker,) = read_measured(path)
    assert (worker.name, len(worker.times)) == ("a", 100)


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot read"):
        read_measured(tmp_path / "none.csv")
