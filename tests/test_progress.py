from __future__ import annotations

import io
import time

import pytest

from codedinvnet.common import progress
from codedinvnet.common.progress import Progress


def test_a_log_has_a_line_now_and_then_and_one_in_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "EVERY", 0.1)
    log, began = io.StringIO(), time.monotonic()
    with Progress(total=1000, desc="train", file=log) as bar:
        for i in range(1000):
            bar.update()
            bar.set_postfix({"loss": i}, refresh=i % 10 == 0)
            time.sleep(0.0005)
    lines = log.getvalue().splitlines()
    assert 3 <= len(lines) <= (time.monotonic() - began) / 0.1 + 2
    assert all(line.startswith("train: ") and "/1000 [" in line for line in lines)
    assert "1000/1000" in lines[-1]
    assert "loss=999" in lines[-1]
    assert "\r" not in log.getvalue()
