from __future__ import annotations

import io
import time

import pytest

from codedinvnet import progress
from codedinvnet.progress import Progress


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


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


def test_short_work_has_its_end_alone_and_what_does_not_stay_nothing() -> None:
    log = io.StringIO()
    assert list(Progress(range(5), file=log)) == list(range(5))
    assert len(log.getvalue().splitlines()) == 1
    log = io.StringIO()
    for _ in Progress(range(5), file=log, leave=False):
        pass
    Progress(total=5, file=log, disable=True).close()
    assert log.getvalue() == ""


def test_a_terminal_has_a_bar() -> None:
    screen = Terminal()
    with Progress(total=5, file=screen, mininterval=0) as bar:
        bar.update(5)
    assert screen.getvalue().count("\r") > 1


def test_what_an_earlier_run_has_done_is_no_speed_of_this_one() -> None:
    screen = Terminal()
    with Progress(total=2000, file=screen, mininterval=0) as bar:
        bar.skip(1000)
        time.sleep(0.05)
        bar.update(1)
        told = bar.format_dict
    assert "1001/2000" in screen.getvalue()
    assert told["rate"] < 50
    Progress(total=5, file=screen, disable=True).skip(5)
