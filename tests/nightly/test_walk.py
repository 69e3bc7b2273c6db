"""All orders of events of a small service, in minutes: `make nightly`."""

from __future__ import annotations

import pytest

from tests.serving.rules.walk import Left, service, walk

pytestmark = pytest.mark.timeout(1200)


@pytest.mark.parametrize(
    ("policy", "left", "fewest"),
    [
        ("coded", Left(), 40_000),
        ("hedge", Left(), 20_000),
        ("replicate", Left(), 3_000),
        ("coded+hedge", Left(hangs=0), 20_000),
        ("coded", Left(submits=(1, 1, 1, 1), hangs=0), 10_000),
    ],
)
def test_every_order_of_events_keeps_the_rules_and_ends(
    policy: str, left: Left, fewest: int
) -> None:
    found = walk(service(policy), left)
    print(f"{policy}, {left}: {len(found.seen)} states, {found.steps} steps, {found.ends} ends")
    assert len(found.seen) > fewest
    assert found.ends
