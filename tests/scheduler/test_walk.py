"""All orders of events of a small service with one mishap; `make nightly` has more."""

from __future__ import annotations

import pytest

from tests.scheduler.walk import Left, service, walk


@pytest.mark.parametrize(
    ("policy", "left", "fewest"),
    [
        ("coded", Left(hangs=0, cancellations=0), 1000),
        ("hedge", Left(hangs=0, crashes=0), 1000),
        ("coded+hedge", Left((2,), 0, 0, 0, losses=1, withheld=1), 500),
    ],
)
def test_every_order_of_events_keeps_the_rules_and_ends(
    policy: str, left: Left, fewest: int
) -> None:
    found = walk(service(policy), left)
    assert len(found.seen) > fewest
    assert found.ends
