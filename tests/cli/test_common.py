from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from codedinvnet.cli.common import CLOSED, guarded
from codedinvnet.evaluation import methods
from tests.conftest import Command


def test_a_reader_that_goes_away_is_no_error() -> None:
    """As of `| head`; also where the rest of the output is written as the process ends."""
    code = (
        "from codedinvnet.cli.common import guarded\n"
        "import sys\n"
        "sys.exit(guarded(lambda: print('many words ' * 100_000)))"
    )
    words = [sys.executable, "-c", code]
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.read(10)
        process.stdout.close()
        assert process.wait(60) == CLOSED
        assert process.stderr.read() == b""


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (OSError(28, "No space left on device"), "No space left on device"),
        (OSError(13, "Permission denied", "here"), "here: Permission denied"),
        (BrokenPipeError(32, "Broken pipe"), "Broken pipe"),  # of another pipe than the output
    ],
)
def test_what_the_system_refuses_is_one_line(
    error: OSError, told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    def refused() -> None:
        raise error

    assert guarded(refused) == 2
    assert capsys.readouterr().err == f"error: {told}\n"


COUNTS = {"kept": 0, "done": 1, "failed": 2}


def test_failures_are_told_after_the_report(
    call: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "rows.jsonl"
    words = ["bench", "accuracy", "--out", out, "--json"]
    monkeypatch.setattr(methods, "run", lambda *_, **__: COUNTS)
    outcome = call(*words)
    assert outcome.code == 2
    assert json.loads(outcome.out)["failed"] == 2
    assert outcome.err.startswith(f"error: 2 of the trials failed; the errors are in {out}")
    assert outcome.err.count("\n") == 1
    monkeypatch.setattr(methods, "run", lambda *_, **__: {**COUNTS, "failed": 0})
    assert call(*words).code == 0
