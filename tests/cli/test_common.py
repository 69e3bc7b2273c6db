from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from codedinvnet.cli.common import CLOSED, guarded
from codedinvnet.evaluation import methods
from tests.conftest import Command, tiny_settings, write_settings


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


FLUSHED: dict[str, list[str]] = {
    "codedinvnet.evaluation.stages.reproduce": ["reproduce", "CONFIG"],
    "codedinvnet.evaluation.methods.run": ["bench", "accuracy", "CONFIG", "--out", "rows.jsonl"],
    "codedinvnet.protect.run.protect": ["protect", "m:f", "--inputs", "x.npy", "--out", "o"],
}
PAPERS = ("codedinvnet.evaluation.stages.train", ["--config_file", "CONFIG"])


@pytest.mark.parametrize(
    ("command", "place", "words"),
    [*(("call", place, words) for place, words in FLUSHED.items()), ("call_paper", *PAPERS)],
)
def test_commands_that_train_flush_denormal_numbers_before_anything_is_computed(
    command: str,
    place: str,
    words: list[str],
    request: pytest.FixtureRequest,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """So that PyTorch's threads, which start with the first large operation, do it as well."""
    call: Command = request.getfixturevalue(command)
    seen = []

    def first(*_: Any, **__: Any) -> None:
        seen.append(float(torch.full((8,), 1e-30).mul(1e-10).sum()))
        raise KeyboardInterrupt

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(place, first)
    supported = torch.set_flush_denormal(False)
    config = write_settings(tmp_path / "own.json", tiny_settings("pixels"))
    call(*(config if word == "CONFIG" else word for word in words))
    assert seen == [0] or (not supported and len(seen) == 1)
    assert torch.full((8,), 1e-30).mul(1e-10).any()  # only the command does


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
