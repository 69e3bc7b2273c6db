"""All orders of events of a small service, in minutes: `make nightly`."""

from __future__ import annotations

import pytest

from tests.nightly.walk import walk

pytestmark = pytest.mark.timeout(1800)


@pytest.mark.parametrize("policy", ["coded", "hedge"])
def test_every_order_ends_every_query_once(policy: str) -> None:
    states, ends = walk(policy)
    print(f"{policy}: {states} states, {ends} ends")
    assert states > 10_000
    assert ends > 10
