from __future__ import annotations

import json
import logging
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from codedinvnet.net import logs
from codedinvnet.net.logs import JsonLines
from codedinvnet.serving import metrics as module
from codedinvnet.serving.answers import Answered, Cancelled, QueryFailed
from codedinvnet.serving.metrics import Metrics, Recent


def value(metrics: Metrics, name: str, **labels: str) -> float | None:
    return metrics.registry.get_sample_value(f"codedinvnet_{name}", labels)


def test_what_can_be_known_begins_at_zero() -> None:
    """`increase()` sees nothing of a first burst whose label begins above 0."""
    metrics = Metrics()
    metrics.expect(workers=2, size=3)
    for name, labels in (
        *(("queries_total", {"outcome": outcome}) for outcome in module.OUTCOMES),
        *(("requests_total", {"code": str(code)}) for code in module.CODES),
        *(("worker_restarts_total", {"reason": reason}) for reason in module.REASONS),
        *(("tasks_total", {"task": kind}) for kind in ("data", "parity")),
        *(("task_failures_total", {"worker": worker}) for worker in "01"),
        *(("groups_total", {"size": size}) for size in "123"),
        *(("query_latency_seconds_count", {"outcome": outcome}) for outcome in module.TAKEN),
        ("hedges_total", {}),
    ):
        assert value(metrics, name, **labels) == 0, (name, labels)


def test_the_text_has_every_figure_and_no_creation_times() -> None:
    metrics = Metrics()
    metrics.answered("direct", 0.1)
    metrics.workers.labels("up").set(3)
    metrics.restarts.labels("hung").inc()
    text = metrics.render().decode()
    assert 'codedinvnet_queries_total{outcome="direct"} 1.0' in text
    assert 'codedinvnet_workers{state="up"} 3.0' in text
    assert 'codedinvnet_worker_restarts_total{reason="hung"} 1.0' in text
    assert "_created" not in text
    assert "process_resident_memory_bytes" in text  # the front end's
    named = {line.split()[2] for line in text.splitlines() if line.startswith("# HELP")}
    assert all(name.startswith(("codedinvnet_", "process_")) for name in named)


def formatted(**changes: Any) -> dict[str, Any]:
    record = logging.LogRecord("x", logging.WARNING, "f.py", 1, "worker %s", ("lost",), None)
    for key, changed in changes.items():
        setattr(record, key, changed)
    line = JsonLines().format(record)
    assert "\n" not in line
    found = json.loads(line)
    assert isinstance(found, dict)
    return found


def test_a_line_has_time_level_event_and_fields() -> None:
    found = formatted(fields={"worker": 3, "reason": "two\nlines"}, msecs=7.0)
    assert list(found) == ["time", "level", "event", "worker", "reason"]
    assert (found["level"], found["event"]) == ("warning", "worker lost")
    assert (found["worker"], found["reason"]) == (3, "two\nlines")
    assert found["time"].endswith(".007Z")
    assert list(formatted()) == ["time", "level", "event"]  # of another logger
    assert formatted(msecs=999.9)["time"].endswith(".999Z")
    assert formatted(fields={"path": Path("a") / "b"})["path"] == str(Path("a") / "b")
    try:
        raise ValueError("what went wrong")
    except ValueError:
        assert "ValueError: what went wrong" in formatted(exc_info=sys.exc_info())["error"]


@pytest.mark.parametrize("seconds", [logs.QUIET, logs.LASTING])
def test_a_flood_of_events_is_logged_once_in_a_while(
    seconds: float, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 100.0
    monkeypatch.setattr(logs, "time", SimpleNamespace(monotonic=lambda: now))
    quiet = logs.Quiet(seconds)
    for _ in range(500):
        quiet.log("query failed", logging.WARNING, query=1)
    now += seconds
    quiet.log("query failed", logging.WARNING, query=2)
    now += seconds
    quiet.log("query failed", logging.WARNING, query=3)
    now -= 50 * seconds  # a clock that was put back
    quiet.log("query failed", logging.WARNING, query=4)
    told = [vars(r)["fields"] for r in caplog.records if r.message == "query failed"]
    assert [(line["query"], line.get("left_out")) for line in told] == [
        (1, None),
        (2, 499),
        (3, None),
        (4, None),
    ]


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
