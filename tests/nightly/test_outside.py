"""Minutes of harm to a service and a gateway, of which clients see nothing: `make nightly`."""

from __future__ import annotations

import asyncio

import pytest

from tests.nightly.outside import proxied, served
from tests.nightly.outside.counts import Count, table
from tests.nightly.outside.served import Sizes

pytestmark = [pytest.mark.nightly, pytest.mark.timeout(1800)]
Counts = dict[str, Count]


@pytest.fixture(scope="module")
def counts(tmp_path_factory: pytest.TempPathFactory) -> Counts:
    log = tmp_path_factory.mktemp("outside") / "log"

    async def harm() -> list[Count]:
        return [*await served.run(Sizes(), log), *await proxied.run(log)]

    found = asyncio.run(harm())
    print(table(found))
    return {count.part: count for count in found}


def test_every_query_is_answered_while_workers_are_killed_and_stopped(counts: Counts) -> None:
    workers = counts["workers"]
    assert workers.answered == workers.sent == Sizes().queries
    for what in ("workers killed", "workers stopped", "fork servers killed"):
        assert workers.notes[what] > 5
    assert workers.notes["decoded"] > 0


def test_nonsense_is_refused_and_harms_nobody(counts: Counts) -> None:
    malformed, bombs = counts["malformed"], counts["bombs"]
    assert malformed.sent == Sizes().malformed
    assert malformed.client_errors > malformed.sent / 2
    assert bombs.answered == bombs.sent > 0
    assert not any(word.endswith(("200", "500")) for word in bombs.notes)


def test_what_upstreams_do_to_a_gateway_no_client_sees(counts: Counts) -> None:
    count = counts["hard replies"]
    assert count.answered == count.sent > 1000
    assert count.notes["stopped in, s"] < 10


def test_memory_has_a_bound(counts: Counts) -> None:
    memory = counts["memory"]
    assert memory.memory_share is not None
    assert 0.5 < memory.memory_share <= 1.1
    assert memory.refused > 0
    assert counts["bombs"].memory_mib < 512


def test_nothing_is_wrong_late_or_lost_and_probes_are_answered(counts: Counts) -> None:
    for count in counts.values():
        assert (count.wrong, count.server_errors, count.lost) == (0, 0, 0), count.part
        assert count.late == 0 or count.part == "memory", count.part
        assert count.probe_ms <= 100, count.part
        assert count.descriptors < 1000, count.part
