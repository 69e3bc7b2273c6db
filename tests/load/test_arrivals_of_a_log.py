"""When the load generator's requests are due: random or equal times, or those of a log."""

from __future__ import annotations

from pathlib import Path

import pytest

from codedinvnet.errors import UserError
from codedinvnet.load.options import LoadOptions, gaps_of


def test_arrivals(tmp_path: Path) -> None:
    gaps = gaps_of(LoadOptions("", rate=100, duration=100, seed=1))
    assert len(gaps) == pytest.approx(10_000, rel=0.05)
    assert 99 < sum(gaps) <= 100
    assert gaps == gaps_of(LoadOptions("", rate=100, duration=100, seed=1))
    for rate, duration, count in ((10, 30, 300), (100, 0.7, 70), (3, 0.5, 1), (4, 0.9, 3)):
        equal = gaps_of(LoadOptions("", rate=rate, duration=duration, arrivals="constant"))
        assert equal == pytest.approx(count * [1 / rate])  # none later than the duration
    with pytest.raises(UserError, match="--duration: no request is due in it"):
        gaps_of(LoadOptions("", rate=1, duration=0.5, arrivals="constant"))
    log = tmp_path / "log"
    log.write_text("time,status\n12.5,200\n10.0,200  # the first\n\n11,500\n99,200\n")
    options = LoadOptions("", arrivals=str(log))
    assert gaps_of(options) == pytest.approx([0, 1, 1.5])
    faster = LoadOptions("", arrivals=str(log), rate=3 / 8.9)
    assert gaps_of(faster) == pytest.approx([0, 0.1, 0.15, 8.65])
    log.write_text("2026-01-31T12:00:00Z GET\n2026-01-31T12:00:02.5Z GET\n")
    assert gaps_of(options) == pytest.approx([0, 2.5])
    log.write_text("2026-01-31 12:00:00.5 GET\n2026-01-31 12:00:03 GET\n")
    assert gaps_of(options) == pytest.approx([0, 2.5])
    log.write_text("2026-01-31 12:00:00,123 INFO a\n2026-01-31 12:00:01,623 INFO b\n")
    assert gaps_of(options) == pytest.approx([0, 1.5])  # as Python's logging writes it
    log.write_text("2026-01-31T12:00:00+0000 a\n2026-01-31T14:00:02.5+02:00\n")
    assert gaps_of(options) == pytest.approx([0, 2.5])
    log.write_text("2026-01-31T12:00:00,100Z a\n2026-01-31T12:00:00,900Z\n")
    assert gaps_of(options) == pytest.approx([0, 0.8])
    log.write_text("2026-01-31T12:00:00,200,GET\n2026-01-31T12:00:02,404,GET\n")
    assert gaps_of(options) == pytest.approx([0, 2])  # columns of a table
    log.write_text("time,ms\n2026-01-31T12:00:00,900\n2026-01-31T12:00:02,404\n")
    assert gaps_of(options) == pytest.approx([0, 2])
    log.write_text("2026-01-31T12:00:00,200\n2026-01-31T12:00:02,1404\n")
    assert gaps_of(options) == pytest.approx([0, 2])
    for line in ("two", "2026-01-31", "2026-01-31 GET", "2026-01-31,20"):
        log.write_text(f"1\n{line}\n")
        with pytest.raises(UserError, match=f"line 2: '{line[:10]}' is no time"):
            gaps_of(options)


def test_a_log_in_another_unit_is_told_of(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    log = tmp_path / "log"
    options = LoadOptions("", arrivals=str(log), duration=10)
    since_1970 = [1_700_000_000_000 + 100 * number for number in range(2000)]
    log.write_text("\n".join(map(str, since_1970)))
    with pytest.raises(UserError, match="is no time in seconds: divide by 1000 if it is in ms"):
        gaps_of(options)
    scaled = LoadOptions("", arrivals=str(log), duration=10, rate=10.0)
    assert len(gaps_of(scaled)) == pytest.approx(100, abs=2)  # the unit does not matter
    assert capsys.readouterr().err == ""
    cases: list[tuple[list[float], str]] = [
        ([100.0 * number for number in range(2000)], "warning: 1 of the 2000 requests"),
        ([number / 10 for number in range(2000)], ""),
        ([5.0 * number for number in range(20)], ""),  # few there, too
    ]
    for times, told in cases:
        log.write_text("\n".join(map(str, times)))
        gaps_of(options)
        err = capsys.readouterr().err
        assert err.startswith(told)
        assert err.count("\n") == bool(told)
