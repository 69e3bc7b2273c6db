"""What a run of the real service says of its work."""

from __future__ import annotations

import pytest

from codedinvnet.evaluation.client import Reply
from codedinvnet.evaluation.service import ParityWait, Run, work_figures


def test_work_is_in_service_times_of_a_query() -> None:
    def metrics(data: int, parity: int, data_s: float, parity_s: float) -> dict[str, float]:
        kinds = {"data": (data, data_s), "parity": (parity, parity_s)}
        found = {"codedinvnet_encode_seconds_sum": 0.1 * parity_s}
        for kind, (count, seconds) in kinds.items():
            found[f'codedinvnet_worker_seconds_sum{{task="{kind}"}}'] = seconds
            found[f'codedinvnet_worker_seconds_count{{task="{kind}"}}'] = count
            found[f'codedinvnet_tasks_total{{task="{kind}"}}'] = count
        return found

    def run(before: dict[str, float], after: dict[str, float]) -> Run:
        return Run([Reply("", tuple(range(100)), 0.1, 200)], before, after, {})

    wait = ParityWait(36.0, 2.0)
    after = metrics(110, 10, 1.2, 0.05)
    after |= {'codedinvnet_groups_total{size="10"}': 5, 'codedinvnet_groups_total{size="4"}': 5}
    found = work_figures(run(metrics(10, 0, 1.0, 0.0), after), 38.0, wait)
    assert found["mean_service_ms"] == pytest.approx(40)  # 38 and 2 of computing
    assert found["work_per_query"] == pytest.approx(
        (100 * 40 + 10 * (36 + 5) + 70 * 2) / (100 * 40), abs=1e-4
    )
    assert found["data_tasks_per_query"] == 1
    assert found["extra_tasks_per_query"] == 0.1
    assert found["encode_ms_per_query"] == pytest.approx(0.05)
    nothing_extra = work_figures(run({}, metrics(100, 0, 0.2, 0.0)), 38.0)
    assert nothing_extra["work_per_query"] == 1
    # Two parities a group, each of which takes all images, and then half of them.
    after |= metrics(110, 20, 1.2, 0.05)
    for two, images in ((wait, 2 * 70), (wait._replace(share=0.5), 70)):
        found = work_figures(run(metrics(10, 0, 1.0, 0.0), after), 38.0, two)
        work = 100 * 40 + 20 * 36 + 50 + images * 2
        assert found["work_per_query"] == pytest.approx(work / (100 * 40), abs=1e-4)
