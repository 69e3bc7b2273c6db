"""All orders of what clients, upstreams and the lines between members do."""

from __future__ import annotations

import pytest

from tests.members.world import Left, World, walk


@pytest.mark.parametrize(
    ("members", "left", "fewest"),
    [
        (2, Left(submits=((1, True), (1, False))), 1000),
        (2, Left(submits=((1, True),), breaks=0, losses=1), 500),
        (2, Left(submits=((1, False),), breaks=0, losses=1), 200),
        pytest.param(
            2, Left(losses=1), 20_000, marks=[pytest.mark.nightly, pytest.mark.timeout(1800)]
        ),
        pytest.param(
            *(3, Left(submits=((2, True), (1, False)), breaks=1), 20_000),
            marks=[pytest.mark.nightly, pytest.mark.timeout(1800)],
        ),
    ],
)
def test_no_query_is_lost_nor_sent_twice_in_any_order(
    members: int, left: Left, fewest: int
) -> None:
    found = walk(World(members), left)
    print(f"{len(found.seen)} states, {found.steps} steps, {found.ends} ends")
    assert len(found.seen) > fewest
    assert found.ends
