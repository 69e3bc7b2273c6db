from __future__ import annotations

from codedinvnet.serving.answers import Answered, Cancelled, QueryFailed
from codedinvnet.serving.recent import Recent


def test_recent_requests_and_work() -> None:
    recent = Recent()
    assert recent.summary(5.0, 0.1) is None
    for seconds in [*([0.1] * 98), 0.2, 3.0]:
        recent.request([Answered({}, "direct", 0.05), Answered({}, "decoded", seconds)])
    recent.request([Answered({}, "direct", 0.1), QueryFailed("lost")], read=0.5)
    recent.request([Cancelled()])  # it says nothing of the service
    for _ in range(202):
        recent.task(0.1)
    assert recent.summary(5.0, 0.1) == {"p50": 100.0, "p99": 200.0, "work": 1.0}
    assert recent.summary(5.0, 0.0) is None  # what a task takes is not known yet
    assert recent.summary(-1.0, 0.1) is None
