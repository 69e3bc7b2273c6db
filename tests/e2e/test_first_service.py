"""The tutorial on a first service: what it says is run, and prints what it shows."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest

from tests.pages import is_like, run, steps
from tests.processes import needs_proc, served


@pytest.mark.nightly(
    reason="its service starts and stops for half a minute; test_serve does the same"
)
@needs_proc
def test_a_stopped_worker_is_made_up_for(tmp_path: Path) -> None:
    _, start, ask, *rest = steps("tutorials/first-service.md")
    outputs = []
    with served(*shlex.split(start.code)[2:], log=tmp_path / "log") as service:
        host = service.address.removeprefix("http://")
        (tmp_path / "ask.py").write_text(ask.code.replace("127.0.0.1:8000", host))
        assert service.found.string == start.shown.replace("127.0.0.1:8000", host)
        for step in rest:
            printed = run(step.code.replace("127.0.0.1:8000", host), tmp_path)
            assert not step.shown or is_like(step.shown, printed), printed
            outputs.append(printed)
    _, _, stopped, *_ = outputs
    assert "'decoded': 1" in stopped
