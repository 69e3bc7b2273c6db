"""The benchmarks of protected models: what they read, and what they lack."""

from __future__ import annotations

import pytest

from benchmarks import protected_serving


def test_work_is_in_service_times_of_a_query() -> None:
    def metrics(data: int, parity: int, data_s: float, parity_s: float) -> dict[str, float]:
        found = {}
        for kind, count, seconds in (("data", data, data_s), ("parity", parity, parity_s)):
            found[f'codedinvnet_worker_seconds_sum{{task="{kind}"}}'] = seconds
            found[f'codedinvnet_worker_seconds_count{{task="{kind}"}}'] = count
            found[f'codedinvnet_tasks_total{{task="{kind}"}}'] = count
        return found

    service = protected_serving.WAIT_MS + 2  # of computing
    before, after = metrics(10, 0, 1.0, 0.0), metrics(110, 10, 1.2, 0.05)
    assert protected_serving.work(before, metrics(110, 0, 1.2, 0.0), 100, None) == 1
    after |= {'codedinvnet_groups_total{size="10"}': 5, 'codedinvnet_groups_total{size="4"}': 5}
    one = protected_serving.work(before, after, 100, protected_serving.Backup(10, 3.0, 1.0))
    assert one == pytest.approx((100 * service + 50 + 3 * 70) / (100 * service))
    # Two tasks a group, each of which takes half of its images.
    after |= metrics(110, 20, 1.2, 0.05)
    two = protected_serving.work(before, after, 100, protected_serving.Backup(10, 3.0, 0.5))
    assert two == pytest.approx(one)
