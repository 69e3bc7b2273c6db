from __future__ import annotations

import math

from benchmarks.gateway_faults import SLOWEST, Harms
from codedinvnet.evaluation.load import Ended


def test_the_slowest_requests_are_told_by_what_was_done_when_they_were_due() -> None:
    harms = Harms([(10.0, "one stands still"), (20.0, "it goes on")])
    ends = [Ended(10.0 + i / SLOWEST, 20.0) for i in range(2 * SLOWEST - 3)]
    ends += [Ended(9.9, 30.0), Ended(19.9, 500.0), Ended(20.1, math.inf)]
    report = harms.report(ends)
    assert report["slowest"] == {"one stands still": 1, "it goes on": 1}
    assert report["during"]["nothing"] == {"p99_ms": 30.0, "max_ms": 30.0}
    assert report["during"]["one stands still"] == {"p99_ms": 20.0, "max_ms": 500.0}
    assert report["during"]["it goes on"] == {"p99_ms": None, "max_ms": None}
