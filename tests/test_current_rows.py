"""Which rows of a file count."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from codedinvnet.current_rows import current_accuracy, current_latency, is_latency_row
from tests.bench.canned import latency_row, row

MS = np.arange(50.0, 150.0)


def test_accuracy_of_older_settings_does_not_count() -> None:
    rows = [row("parm", 0.2, seed=seed, epochs=1) for seed in (1, 2)]
    rows += [row("parm", 0.6, seed=1, epochs=9)]
    assert current_accuracy(rows) == rows[2:]


def test_a_settings_number_of_patterns_concerns_that_setting_alone() -> None:
    one = [row("coded-invnet", 0.93), row("parm", 0.5, k=4)]
    two = [row(label, 0.71, missing=2) for label in ("coded-invnet", "nercc")]
    new = row("coded-invnet", 0.75, missing=2, patterns=300)
    assert current_accuracy([*one, *two, new]) == [*one, new]


def test_a_trial_that_was_run_again_counts_once() -> None:
    failed, done = row("parm", 0.0, error="RuntimeError: no"), row("parm", 0.5)
    assert failed["key"] == done["key"]
    assert current_accuracy([failed, done]) == [done]


@pytest.mark.parametrize(
    "changed", [{"held_ms": 50.0}, {"machine": "another"}, {"cores": 8}, {"wait_ms": 1.0}]
)
def test_latencies_that_were_measured_otherwise_are_not_pooled(changed: dict[str, Any]) -> None:
    rows = [latency_row("coded", MS, run=run) for run in (1, 2)]
    last = latency_row("coded", MS, run=3, **changed)
    assert current_latency([*rows, last]) == [last]


def test_the_threads_of_the_process_that_sends_are_no_other_machine() -> None:
    machines = [f"box, {threads}, Python 3" for threads in ("2 threads", "1 threads", "1 thread")]
    rows = [
        latency_row("coded", MS, run=run, machine=machine) for run, machine in enumerate(machines)
    ]
    assert current_latency(rows) == rows


def test_quick_latencies_count_where_a_data_set_has_no_others() -> None:
    rows = [latency_row("coded", MS), latency_row("coded", MS, run=2, quick=True)]
    assert current_latency(rows) == rows[:1]
    assert current_latency(rows[1:]) == rows[1:]


def test_rows_of_somebody_else_are_told_apart() -> None:
    own = latency_row("coded", MS)
    assert is_latency_row(own)
    assert not is_latency_row({**own, "settings": {}})
    assert not is_latency_row({name: own[name] for name in own if name != "cores"})
