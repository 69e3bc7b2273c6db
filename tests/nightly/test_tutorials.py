"""The tutorials on a log and on a model of one's own: they print what they show."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest

from tests.pages import is_like, run, steps
from tests.processes import served

pytestmark = pytest.mark.nightly


def test_a_latency_log_says_how_many_machines(tmp_path: Path) -> None:
    script, plan, simulate = steps("tutorials/your-latency-log.md")
    (tmp_path / "script.py").write_text(script.code)
    run("python script.py", tmp_path)
    fitted, policies = (
        text.split("\n\npolicy ") for text in (plan.shown, run(plan.code, tmp_path))
    )
    assert fitted[0] == policies[0]
    shown, found = (
        {line.split()[0] for line in table.splitlines()[1:]} for table in (fitted[1], policies[1])
    )
    assert shown == found
    assert "p999_ms" in run(simulate.code, tmp_path)


def test_a_model_of_ones_own_is_served_and_protected(tmp_path: Path) -> None:
    script, info, serve, protect, protected, *_ = steps("tutorials/your-own-model.md")
    (tmp_path / "script.py").write_text(script.code)
    run("python script.py", tmp_path)
    assert is_like(info.shown, run(info.code, tmp_path))
    run(protect.code.replace("--minutes 20", "--minutes 0.5"), tmp_path, timeout=900)
    for step in (serve, protected):
        words = shlex.split(step.code.replace("digits", str(tmp_path / "digits")))[2:]
        with served(*words, log=tmp_path / "log"):
            pass
