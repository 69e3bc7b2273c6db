from __future__ import annotations

from benchmarks.gateway_faults import SLOWEST, Harms


def test_the_slowest_requests_are_told_by_what_was_done_when_they_were_due() -> None:
    harms = Harms([(10.0, "one stands still"), (20.0, "it goes on")])
    ends = [(10.0 + i / SLOWEST, 0.02) for i in range(2 * SLOWEST - 3)]
    ends += [(9.9, 0.03), (19.9, 0.5), (20.1, 0.4)]
    report = harms.report(ends)
    assert report["slowest"] == {"one stands still": 1, "it goes on": 1}
    assert report["during"]["nothing"] == {"p99_ms": 30.0, "max_ms": 30.0}
    assert report["during"]["one stands still"] == {"p99_ms": 20.0, "max_ms": 500.0}
