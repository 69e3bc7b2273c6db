from __future__ import annotations

import sys
from pathlib import Path

import pytest

from codedinvnet.common.provenance import describe_command


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["/somewhere/bin/codedinvnet", "info", "mnist"], "codedinvnet info mnist"),
        (["/somewhere/benchmarks/__main__.py", "train"], "python -m benchmarks train"),
        (["x", "/else/where/a.npz", "--out", "{here}/runs/a"], "x a.npz --out runs/a"),
        (["x", "--out=/else/where/a", "--a=b/c", "../d"], "x --out=a --a=b/c ../d"),
    ],
)
def test_a_command_tells_no_folder_of_the_machine(
    words: list[str], told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [word.format(here=Path.cwd()) for word in words])
    assert describe_command() == told
