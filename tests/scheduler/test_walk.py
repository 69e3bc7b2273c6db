"""All orders of events of a small service."""

from __future__ import annotations

import pytest

from tests.scheduler.walk import Left, service, walk

BY_DAY = [
    ("coded", 1, Left(hangs=0, cancellations=0), 1000),
    ("hedge", 1, Left(hangs=0, crashes=0), 1000),
    ("coded+hedge", 1, Left((2,), 0, 0, 0, losses=1, withheld=1), 500),
    ("hedge", 1, Left((2,), crashes=1, hangs=0, cancellations=0, takeovers=1), 500),
    ("hedge", 1, Left((2, 1), crashes=0, hangs=0, cancellations=0, takeovers=1), 500),
]
"""With one mishap; the others take minutes."""

NIGHTLY = [
    ("coded", 1, Left(), 40_000),
    ("hedge", 1, Left(), 20_000),
    ("replicate", 1, Left(), 2_000),
    ("coded+hedge", 1, Left(hangs=0, cancellations=0), 50_000),
    ("coded", 1, Left(submits=(1, 1, 1, 1), hangs=0, cancellations=0), 5_000),
    ("hedge", 2, Left(hangs=0), 20_000),
    ("coded+hedge", 1, Left((2,), crashes=0, cancellations=0, losses=1, withheld=1), 4_000),
    ("hedge", 1, Left((2, 1), hangs=0, losses=1, takeovers=2), 10_000),
]


@pytest.mark.parametrize(
    ("policy", "worker_batch", "left", "fewest"),
    BY_DAY
    + [
        pytest.param(*case, marks=[pytest.mark.nightly, pytest.mark.timeout(1200)])
        for case in NIGHTLY
    ],
)
def test_every_order_of_events_keeps_the_rules_and_ends(
    policy: str, worker_batch: int, left: Left, fewest: int
) -> None:
    found = walk(service(policy, worker_batch), left)
    print(f"{len(found.seen)} states, {found.steps} steps, {found.ends} ends")
    assert len(found.seen) > fewest
    assert found.ends
