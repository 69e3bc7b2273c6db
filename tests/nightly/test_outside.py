"""Minutes of harm, nonsense, dawdling, bombs and overload: `make nightly`."""

from __future__ import annotations

import asyncio

import pytest

from tests.nightly import outside

pytestmark = pytest.mark.timeout(1800)


@pytest.fixture(scope="module")
def counts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, outside.Count]:
    log = tmp_path_factory.mktemp("outside") / "log"
    found = asyncio.run(outside.run("mnist", outside.Sizes(), 0, log))
    for count in found.values():
        print(count)
    return found


def test_every_query_is_answered_while_workers_are_killed_and_stopped(
    counts: dict[str, outside.Count],
) -> None:
    harmed = counts["harmed"]
    assert harmed.answered == harmed.sent == outside.Sizes().queries
    assert (harmed.wrong, harmed.late) == (0, 0)
    for what in ("workers killed", "workers stopped", "fork servers killed"):
        assert harmed.notes[what] > 5
    assert harmed.notes["decoded"] > 0


def test_nonsense_is_refused_and_harms_nobody(counts: dict[str, outside.Count]) -> None:
    malformed, slow, bombs = (counts[name] for name in ("malformed", "slow", "bombs"))
    assert malformed.sent == outside.Sizes().malformed
    assert (malformed.server_errors, malformed.lost) == (0, 0)
    assert malformed.client_errors > malformed.sent / 2
    assert slow.answered == slow.sent > 0
    assert slow.wrong == 0
    assert bombs.sent == bombs.client_errors + bombs.refused + bombs.lost > bombs.lost


def test_an_overloaded_service_does_what_it_can(counts: dict[str, outside.Count]) -> None:
    overloaded = counts["overloaded"]
    assert (overloaded.late, overloaded.wrong, overloaded.server_errors) == (0, 0, 0)
    assert overloaded.refused > overloaded.answered
    assert overloaded.notes["goodput of capacity"] > 0.85


def test_the_service_is_alive_all_the_time(counts: dict[str, outside.Count]) -> None:
    for count in counts.values():
        assert count.probe_ms < 1000, count.part
    first, last = counts["harmed"], counts["bombs"]
    assert last.memory_mib < first.memory_mib + 200
    assert last.descriptors < first.descriptors + 100
