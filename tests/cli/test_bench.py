from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from codedinvnet.evaluation import latency, methods
from tests.conftest import Command

CONFIGS = Path(__file__).resolve().parents[2] / "configs" / "bench"
COUNTS = {"kept": 0, "done": 1, "failed": 2}


@pytest.mark.parametrize(
    ("module", "name", "what"), [(methods, "accuracy", "trials"), (latency, "latency", "runs")]
)
def test_failures_are_told_after_the_report(
    module: Any, name: str, what: str, call: Command, tmp_path: Path, monkeypatch: Any
) -> None:
    out = tmp_path / "rows.jsonl"
    words = ["bench", name, CONFIGS / f"{name}.json", "--out", out, "--json"]
    monkeypatch.setattr(module, "run", lambda *_, **__: COUNTS)
    outcome = call(*words)
    assert outcome.code == 2
    assert json.loads(outcome.out)["failed"] == 2
    assert outcome.err.startswith(f"error: 2 of the {what} failed; the errors are in {out}")
    assert outcome.err.count("\n") == 1
    monkeypatch.setattr(module, "run", lambda *_, **__: {**COUNTS, "failed": 0})
    assert call(*words).code == 0
