"""What operators see of a gateway's upstreams: metrics, and lines of the log."""

from __future__ import annotations

import asyncio
import json
import logging
import math
from pathlib import Path
from typing import Any

import pytest

from codedinvnet.serving.gateway import places
from codedinvnet.serving.gateway.relay import Relay
from codedinvnet.serving.gateway.upstream_metrics import RESULTS
from codedinvnet.serving.gateway.upstreams import open_upstream
from tests.observing import until
from tests.serving.gateway.asking import ask, is_up
from tests.serving.gateway.fakes import Fake, gateway
from tests.serving.gateway.servers import Server, asked, queries


def figure(relay: Relay, name: str, **labels: str) -> float:
    value = relay.front.metrics.registry.get_sample_value(f"codedinvnet_{name}", labels)
    assert value is not None, (name, labels)
    return value


def results(relay: Relay, fake: Fake) -> dict[str, float]:
    """Return how many calls of an upstream ended how, if any did."""
    found = {
        result: figure(relay, "upstream_calls_total", upstream=fake.url, result=result)
        for result in RESULTS
    }
    return {result: count for result, count in found.items() if count}


async def test_what_an_upstream_never_answers_is_among_its_seconds() -> None:
    """Or its p99 would be best when it hangs."""
    fake = Fake()

    async with gateway(fake, deadline_ms=300) as (address, relay, _):
        fake.hold()
        assert (await ask(address)).status == 504
        await until(lambda: results(relay, fake) == {"failed": 1})
        assert figure(relay, "upstream_seconds_count", upstream=fake.url) == 1
        assert figure(relay, "upstream_seconds_sum", upstream=fake.url) >= 0.25
        fake.go()
        assert (await ask(address)).status == 200
        assert figure(relay, "upstream_seconds_count", upstream=fake.url) == 2


async def test_calls_at_an_upstream_that_is_removed_have_not_failed() -> None:
    steady, going = Fake(), Fake()

    async with gateway(steady, going, policy="uncoded", deadline_ms=60_000) as (address, relay, _):
        for fake in (steady, going):
            fake.hold()
        both = [asyncio.create_task(ask(address)) for _ in range(2)]
        await until(lambda: bool(steady.seen and going.seen))
        relay.pool.change([steady.url], open_upstream)
        await until(lambda: results(relay, going) == {"stopped": 1})
        for fake in (steady, going):
            fake.go()
        assert {reply.status for reply in await asyncio.gather(*both)} == {200}
        assert results(relay, steady) == {"ok": 2}


async def test_a_backup_on_an_upstreams_server_has_figures_of_its_own(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO, "codedinvnet.serving")
    server = Server()
    await server.start()

    url = f"{server.url}/v2/models/m"
    options: dict[str, Any] = {"backup_upstream": url, "deadline_ms": 60_000}
    async with gateway(server, **options) as (address, relay, _):
        assert (await asked(address, queries(1))).status == 200
        for name, calls in ((server.url, 1), (url, 0)):
            assert figure(relay, "upstream_seconds_count", upstream=name) == calls
        added = [(line["upstream"], line["worker"]) for line in lines(caplog, "upstream added")]
        assert added == [(server.url, 0), (url, 1)]


async def test_nothing_is_said_to_be_released_where_nothing_can_be() -> None:
    async with gateway(Fake()) as (_, relay, _):
        assert math.isnan(figure(relay, "releasing"))


async def test_retries_are_counted_and_so_are_those_that_the_budget_refuses(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(places, "MOST_RETRIES", 3.0)
    fakes = Fake(), Fake()

    async with gateway(*fakes, policy="uncoded", deadline_ms=60_000) as (address, relay, _):
        assert figure(relay, "upstream_retries_total", result="refused") == 0
        for fake in fakes:
            fake.status = 500
        for _ in range(20):
            assert (await ask(address)).status == 500
        sent = figure(relay, "upstream_retries_total", result="sent")
        assert sum(len(fake.seen) for fake in fakes) == 20 + sent
        assert 3 <= sent <= 7
        assert figure(relay, "upstream_retries_total", result="refused") == 20
        assert is_up(relay) == [True, True]


def lines(caplog: pytest.LogCaptureFixture, event: str) -> list[dict[str, Any]]:
    """Return what was logged with an event."""
    return [vars(record)["fields"] for record in caplog.records if record.message == event]


async def test_a_request_whose_time_is_over_tells_where_it_was(
    caplog: pytest.LogCaptureFixture,
) -> None:
    fake, options = Fake(), {"policy": "uncoded", "slots": 1, "deadline_ms": 500}

    async with gateway(fake, **options) as (address, _, _):
        fake.hold()
        first, second = await asyncio.gather(ask(address), ask(address))
        assert {first.status, second.status} == {504}
        hung, queued = f"deadline; at upstream {fake.url}", "deadline; no upstream was free"
        bodies = sorted(json.loads(reply.body)["error"] for reply in (first, second))
        assert bodies == [hung, queued]
        (told,) = lines(caplog, "query failed")  # of two in a second
        assert (told["reason"], told["at"]) in ((hung, [fake.url]), (queued, []))
        fake.go()


async def test_all_that_a_silent_upstream_was_at_tells_its_name_and_what_it_did(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Not that something was lost. The other one is away."""
    silent, away = Fake(), Fake()

    options = {"policy": "uncoded", "deadline_ms": 2500, "hang_timeout_ms": 800}
    async with gateway(silent, away, **options) as (address, relay, _):
        await away.stop()
        await until(lambda: is_up(relay) == [True, False])
        silent.hold()
        silent.ready = False
        first = asyncio.create_task(ask(address))
        await asyncio.sleep(0.5)
        later = await ask(address)  # which was not late itself when the first was
        told = f"{silent.url}: no answer within 0.8 s"
        for reply in (await first, later):
            assert reply.status == 504
            assert json.loads(reply.body)["error"].endswith(f"last failure: {told}")
        assert figure(relay, "worker_restarts_total", reason="hung") == 1
        assert figure(relay, "worker_restarts_total", reason="died") == 1
        assert [line["reason"] for line in lines(caplog, "worker lost") if not line["worker"]] == [
            told
        ]
        silent.go()


async def test_the_log_tells_which_upstream_has_which_place(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO, "codedinvnet.serving")
    steady, away, later = Fake(), Fake(), Fake()

    for fake in (away, later):
        await fake.start()
    await away.stop()
    async with gateway(steady, away) as (_, relay, _):
        (ready,) = lines(caplog, "ready")
        assert (ready["up"], ready["upstreams"]) == (1, 2)
        relay.pool.change([steady.url, later.url], open_upstream)
        await until(lambda: is_up(relay) == [True, True])
    places = {"upstream": steady.url, "worker": 0}, {"upstream": away.url, "worker": 1}
    new = {"upstream": later.url, "worker": 1}
    assert lines(caplog, "upstream added") == [*places, new]
    assert lines(caplog, "upstream is back") == [new]
    (aside,) = lines(caplog, "upstream set aside")
    assert {name: aside[name] for name in places[1]} == places[1]


async def test_a_gateway_without_upstreams_is_not_called_ready(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "codedinvnet.serving")
    file, away = tmp_path / "upstreams", Fake()
    await away.start()
    file.write_text(away.url)
    await away.stop()
    async with gateway(upstreams_file=file):
        (started,) = lines(caplog, "started")
        assert (started["up"], started["upstreams"]) == (0, 1)
        assert lines(caplog, "ready") == []
