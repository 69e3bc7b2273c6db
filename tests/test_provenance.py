from __future__ import annotations

import sys
from pathlib import Path

import pytest

from codedinvnet.common import provenance
from codedinvnet.common.provenance import (
    describe_command,
    describe_machine,
    processor_name,
)


def test_a_machine_has_the_name_of_its_processor(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "cpuinfo"
    file.write_text("processor\t: 0\nmodel\t\t: 17\nmodel name\t: Some CPU @ 2: 3 GHz\n")
    assert processor_name(file) == "Some CPU @ 2: 3 GHz"
    file.write_text("processor\t: 0\nBogoMIPS\t: 50.00\n")
    assert processor_name(file) == ""
    monkeypatch.setattr(provenance, "processor_name", lambda: "")
    plain = describe_machine()
    monkeypatch.setattr(provenance, "processor_name", lambda: "Some CPU")
    assert describe_machine() == plain.replace(", ", ", Some CPU, ", 1)
    assert ", ," not in plain


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
