from __future__ import annotations

import json
from pathlib import Path

import pytest

from codedinvnet.evaluation import methods
from tests.conftest import Command

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
