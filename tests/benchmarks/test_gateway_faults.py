from __future__ import annotations

import asyncio
import json
import math
from typing import Any

import pytest

from benchmarks import gateway_faults
from benchmarks.gateway_faults import SLOWEST, Harms, loaded
from codedinvnet.serving.gateway.calls import Reply, Unreachable


def test_the_slowest_requests_are_told_by_what_was_done_when_they_were_due() -> None:
    harms = Harms([(10.0, "one stands still"), (20.0, "it goes on")])
    ends = [(10.0 + i / SLOWEST, 20.0) for i in range(2 * SLOWEST - 3)]
    ends += [(9.9, 30.0), (19.9, 500.0), (20.1, math.inf)]
    report = harms.report(ends)
    assert report["slowest"] == {"one stands still": 1, "it goes on": 1}
    assert report["during"]["nothing"] == {"p99_ms": 30.0, "max_ms": 30.0}
    assert report["during"]["one stands still"] == {"p99_ms": 20.0, "max_ms": 500.0}
    assert report["during"]["it goes on"] == {"p99_ms": None, "max_ms": None}


@pytest.mark.parametrize("good", [20, 0])
async def test_waiting_for_what_is_never_answered_is_no_time_of_the_load(
    good: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Upstream:
        seen = -1

        async def infer(self, *_: Any) -> Reply:
            self.seen += 1
            if self.seen >= good:
                await asyncio.sleep(2.0)
                raise Unreachable("no answer")
            values = [3.0 * self.seen + 1] * 4
            output = {"name": "y", "datatype": "FP32", "shape": [1, 4], "data": values}
            return Reply("http", 200, json.dumps({"outputs": [output]}).encode())

        async def close(self) -> None: ...

    monkeypatch.setattr(gateway_faults, "open_upstream", lambda *_, **__: Upstream())
    found = await loaded(["http://a"], [0.005] * 25, "some")
    assert (found["answered"], found["wrong"]) == (good, 0)
    assert (found["goodput"] > 12) == (good > 0)  # 20 in 0.15 s, and not in 2.2
