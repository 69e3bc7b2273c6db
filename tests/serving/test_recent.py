from __future__ import annotations

from types import SimpleNamespace

import pytest

from codedinvnet.serving import metrics as module
from codedinvnet.serving.answers import Answered, Cancelled, QueryFailed
from codedinvnet.serving.metrics import Recent


def test_recent_requests_and_work() -> None:
    recent = Recent()
    assert recent.summary(5.0, 0.1) is None
    for seconds in [*([0.1] * 98), 0.2, 3.0]:
        recent.request([Answered({}, "direct", 0.05), Answered({}, "decoded", seconds)])
    recent.request([Answered({}, "direct", 0.1), QueryFailed("lost")], read=0.5)
    recent.request([Cancelled()])  # it says nothing of the service
    for _ in range(202):
        recent.call(0.1)
    assert recent.summary(5.0, 0.1) == {"p50": 100.0, "p99": 200.0, "work": 1.0}
    assert recent.summary(5.0, 0.0) is None  # what a task takes is not known yet
    assert recent.summary(-1.0, 0.1) is None


def test_percentiles_of_recent_answers() -> None:
    recent = Recent()
    assert recent.percentiles() == {}
    recent.answer("decoded", 0.03)
    for i in range(1000):
        recent.answer("direct", (999 - i) / 1000)
    assert recent.percentiles() == {
        "decoded": {"p50": 30.0, "p99": 30.0, "p999": 30.0},
        "direct": {"p50": 499.0, "p99": 989.0, "p999": 998.0},
    }
    for _ in range(module.KEPT):
        recent.answer("direct", 0.001)
    assert recent.percentiles()["direct"] == {"p50": 1.0, "p99": 1.0, "p999": 1.0}


def test_throughput_counts_the_last_whole_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: now))
    recent, found = Recent(), []
    for at, answers in ((100.0, 30_000), (104.5, 5), (105.5, 0), (106.5, 0), (120.0, 1)):
        now = at
        for _ in range(answers):
            recent.answer("direct", 0.1)
        found.append(recent.throughput())
    assert found == [0, 6000, 6001, 1, 0]
