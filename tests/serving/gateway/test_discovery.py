"""Upstreams that come and go: a file that is watched, and names that are resolved anew."""

from __future__ import annotations

import asyncio
import socket
import time
from pathlib import Path
from typing import Any

import pytest

from codedinvnet.errors import UserError
from codedinvnet.serving.gateway import discovery, roster, run
from codedinvnet.serving.gateway.discovery import Discovery
from codedinvnet.serving.gateway.upstreams import Upstream, open_upstream
from codedinvnet.serving.supervisor import ABSENT, DOWN, STATES, UP
from tests.observing import until
from tests.serving.gateway.asking import ask, is_up
from tests.serving.gateway.fakes import Fake, GrpcFake, gateway


async def test_upstreams_come_and_go_with_a_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second, third = Fake(), Fake(), Fake()
    file = tmp_path / "upstreams"
    looks, urls = [0], Discovery.urls

    async def counting(discovery: Discovery) -> tuple[list[str], str]:
        looks[0] += 1
        return await urls(discovery)

    async def looked() -> None:
        before = looks[0]
        await until(lambda: looks[0] >= before + 2)  # the first may have begun before

    monkeypatch.setattr(Discovery, "urls", counting)

    for fake in (first, second, third):
        await fake.start()
    file.write_text(f"# ours\n{first.url}\n\n{second.url}  # the large one\n")
    async with gateway(upstreams_file=file, policy="uncoded") as (address, relay, _):

        def up() -> set[str]:
            return {place.upstream.url for place in relay.pool.places if place.up}

        async def ask_all() -> None:
            for fake in (first, second, third):
                fake.seen.clear()
            for _ in range(12):
                assert (await ask(address)).status == 200

        await ask_all()
        assert first.seen
        assert second.seen
        file.write_text(f"{second.url}\n{third.url}\n")
        await until(lambda: up() == {second.url, third.url})
        await ask_all()
        assert first.seen == []
        assert third.seen
        file.write_text(f"{third.url}\nftp://nowhere\n")  # all is left as it was
        await looked()
        file.unlink()
        await looked()
        assert up() == {second.url, third.url}
        await ask_all()
        file.write_text(first.url)
        await until(lambda: up() == {first.url})
        await ask_all()
        assert len(first.seen) == 12
    for fake in (first, second, third):
        await fake.stop()


async def test_what_is_asked_while_an_upstream_goes_is_not_lost(tmp_path: Path) -> None:
    slow, other = Fake(), Fake()
    file = tmp_path / "upstreams"

    await slow.start()
    await other.start()
    file.write_text(slow.url)
    options = {"upstreams_file": file, "policy": "uncoded", "hang_timeout_ms": 50_000}
    async with gateway(deadline_ms=60_000, **options) as (address, *_):
        slow.delay = 50.0
        asked = asyncio.create_task(ask(address))
        await until(lambda: len(slow.seen) == 1)
        file.write_text(other.url)
        began = time.monotonic()
        assert (await asked).status == 200
        assert time.monotonic() - began < 20  # as soon as that is known
        assert len(other.seen) == 1
    await slow.stop()
    await other.stop()


async def test_a_place_that_is_empty_is_no_worker_that_died(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    first, second, file = Fake(), Fake(), tmp_path / "upstreams"

    for fake in (first, second):
        await fake.start()
    file.write_text(first.url)
    async with gateway(upstreams_file=file) as (address, relay, _):
        front = relay.front
        value = front.metrics.registry.get_sample_value

        async def become(*urls: str) -> None:
            file.write_text("\n".join(urls))
            await until(lambda: front.scheduler.workers_up == len(urls))
            assert (await ask(address)).status == 200

        await become(first.url, second.url)
        await become(second.url)
        await become(first.url, second.url)
        front.update_gauges()
        found = {state: value("codedinvnet_workers", {"state": state}) for state in STATES}
        assert found.pop(UP) == 2
        assert found.pop(ABSENT) == len(front.workers) - 2
        assert set(found.values()) == {0}
        assert value("codedinvnet_worker_restarts_total", {"reason": "died"}) == 0
    assert "worker lost" not in caplog.messages
    for fake in (first, second):
        await fake.stop()


async def test_an_upstream_that_died_and_is_removed_is_absent(tmp_path: Path) -> None:
    """Whoever has its place later has not been down for so long."""
    first, second, third = Fake(), Fake(), Fake()
    file = tmp_path / "upstreams"

    for fake in (first, second, third):
        await fake.start()
    file.write_text(f"{first.url}\n{second.url}")
    async with gateway(upstreams_file=file) as (_, relay, _):
        front = relay.front
        value = front.metrics.registry.get_sample_value

        def states() -> dict[str, float | None]:
            front.update_gauges()
            found = {state: value("codedinvnet_workers", {"state": state}) for state in STATES}
            return {state: count for state, count in found.items() if count}

        empty = len(front.workers) - 2
        await until(lambda: states() == {UP: 2, ABSENT: empty})
        await second.stop()
        await until(lambda: states() == {UP: 1, DOWN: 1, ABSENT: empty})
        file.write_text(first.url)
        await until(lambda: states() == {UP: 1, ABSENT: empty + 1})
        file.write_text(f"{first.url}\n{third.url}")
        await until(lambda: states() == {UP: 2, ABSENT: empty})
    for fake in (first, third):
        await fake.stop()


async def test_an_upstream_that_is_removed_while_it_is_probed_leaves_its_place(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(roster, "PROBE_TIMEOUT", 60.0)
    steady, away, later = Fake(), GrpcFake(), Fake()

    for fake in (away, later):
        await fake.start()
    await away.stop()
    away.held.clear()
    async with gateway(steady, away) as (_, relay, _):
        await until(lambda: is_up(relay) == [True, False])
        await away.start()
        await until(lambda: away.probes == 1)
        relay.pool.change([steady.url], open_upstream)
        relay.pool.change([steady.url, later.url], open_upstream)
        await until(lambda: is_up(relay) == [True, True])
    await later.stop()


async def test_upstreams_without_a_place_wait_for_one(caplog: pytest.LogCaptureFixture) -> None:
    """They are looked for every second, and opened and told of once."""
    first, second, third = Fake(), Fake(), Fake()
    opened: list[str] = []

    def open_one(url: str) -> Upstream:
        opened.append(url)
        return open_upstream(url)

    await third.start()
    async with gateway(first, second) as (_, relay, _):
        for _ in range(3):
            relay.pool.change([first.url, second.url, third.url, "http://127.0.0.1:9"], open_one)
        assert opened == []
        told = [vars(r)["fields"] for r in caplog.records if r.message.startswith("no place")]
        assert told == [{"upstream": third.url}, {"upstream": "http://127.0.0.1:9"}]
        relay.pool.change([first.url, third.url], open_one)
        assert opened == [third.url]
        await until(lambda: is_up(relay) == [True, True])
    await third.stop()


async def test_others_are_watched_after_one_is_removed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(roster, "PROBE_PERIOD", 0.05)
    monkeypatch.setattr(roster, "PROBE_TIMEOUT", 60.0)
    steady, going = Fake(), GrpcFake()

    async with gateway(steady, going) as (_, relay, _):
        going.held.clear()
        before = going.probes
        await until(lambda: going.probes > before)
        relay.pool.change([steady.url], open_upstream)
        before = steady.probes
        await until(lambda: steady.probes > before + 2)


async def test_others_are_watched_though_one_answers_nonsense(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(roster, "PROBE_PERIOD", 0.05)
    steady, strange = Fake(), GrpcFake()

    strange.ready = b"\xff"
    async with gateway(steady, strange):
        await until(lambda: strange.probes > 2)
        before = steady.probes
        await until(lambda: steady.probes > before + 2)


async def test_the_figures_of_an_upstream_that_is_gone_are_forgotten(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(roster, "FORGOTTEN", 0.1)
    first, second, file = Fake(), Fake(), tmp_path / "upstreams"

    for fake in (first, second):
        await fake.start()
    file.write_text(f"{first.url}\n{second.url}")
    async with gateway(upstreams_file=file) as (address, relay, _):

        def told() -> str:
            return relay.front.metrics.render().decode()

        async def are_asked() -> None:
            first.seen.clear()
            while not first.seen:
                assert (await ask(address)).status == 200

        await are_asked()
        assert first.url in told()
        file.write_text(second.url)
        await until(lambda: first.url not in told())
        file.write_text(f"{first.url}\n{second.url}")
        await until(lambda: relay.front.scheduler.workers_up == 2)
        await are_asked()
        calls = f'codedinvnet_upstream_calls_total{{result="ok",upstream="{first.url}"}}'
        assert calls in told()
        file.write_text(second.url)
        await until(lambda: first.url not in told())
    for fake in (first, second):
        await fake.stop()


async def test_figures_are_forgotten_a_while_after_the_last_removal(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    first, second = Fake(), Fake()

    async with gateway(first, second) as (_, relay, _):
        monkeypatch.setattr(roster, "FORGOTTEN", 0.3)
        relay.pool.change([second.url], open_upstream)
        await asyncio.sleep(0.1)  # it has begun to wait
        monkeypatch.setattr(roster, "FORGOTTEN", 3600.0)
        relay.pool.change([first.url, second.url], open_upstream)
        relay.pool.change([second.url], open_upstream)
        await asyncio.sleep(0.5)
        assert first.url in relay.front.metrics.render().decode()


async def test_what_upstreams_cannot_do_in_time_is_refused(tmp_path: Path) -> None:
    """However many others may come."""
    fake, file = Fake(), tmp_path / "upstreams"

    await fake.start()
    file.write_text(fake.url)
    options: dict[str, Any] = {"policy": "uncoded", "slots": 2, "deadline_ms": 2000}
    async with gateway(upstreams_file=file, **options) as (address, relay, _):
        await until(lambda: relay.front.scheduler.workers_up == 1)
        fake.delay = 0.1
        replies = await asyncio.gather(*(ask(address) for _ in range(200)))
        statuses = [reply.status for reply in replies]
        assert statuses.count(503) > 100
        assert statuses.count(504) < 30
    await fake.stop()


@pytest.mark.parametrize("mistake", ["a name", "our own"])
async def test_upstreams_are_looked_for_after_a_mistake(
    mistake: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(discovery, "PERIOD", 0.05)
    first, second, file = Fake(), Fake(), tmp_path / "upstreams"
    fails: list[Exception] = []

    class Failing(Discovery):
        async def urls(self) -> tuple[list[str], str]:
            if fails:
                raise fails.pop()
            return await super().urls()

    for fake in (first, second):
        await fake.start()
    file.write_text(first.url)
    monkeypatch.setattr(run, "Discovery", Failing)
    async with gateway(upstreams_file=file) as (_, relay, _):
        if mistake == "a name":
            file.write_text(f"{first.url}\ndns+http://triton..svc:8000")
        else:
            fails.append(ValueError("it is ours"))
        await until(lambda: "upstreams are kept" in caplog.messages)
        file.write_text(f"{first.url}\n{second.url}")
        await until(lambda: relay.front.scheduler.workers_up == 2)
    told = next(r for r in caplog.records if r.message == "upstreams are kept")
    assert (told.exc_info is not None) == (mistake == "our own")
    for fake in (first, second):
        await fake.stop()


async def test_that_upstreams_are_kept_is_not_told_at_each_look(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(discovery, "PERIOD", 0.01)
    fake, file, looks = Fake(), tmp_path / "upstreams", 0

    class Counting(Discovery):
        async def urls(self) -> tuple[list[str], str]:
            nonlocal looks
            looks += 1
            return await super().urls()

    async def looked() -> None:
        before = looks
        await until(lambda: looks > before + 20)

    def told() -> list[str]:
        found = [vars(r)["fields"] for r in caplog.records if r.message == "upstreams are kept"]
        return [fields["reason"] for fields in found]

    await fake.start()
    file.write_text(fake.url)
    monkeypatch.setattr(run, "Discovery", Counting)
    async with gateway(upstreams_file=file):
        for _ in range(2):
            file.rename(tmp_path / "away")
            await looked()
            (tmp_path / "away").rename(file)
            await looked()
        assert told() == 2 * [f"--upstreams-file: cannot read {file}: No such file or directory"]
    await fake.stop()


def test_each_address_of_a_name_is_an_upstream() -> None:
    found = ["10.0.0.1", "10.0.0.2", "fd00::1"]

    async def resolve(host: str, port: int) -> list[str]:
        assert (host, port) == ("triton", 8001)
        if not found:
            raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")
        return found

    found_by = Discovery(["http://a:1", "dns+grpc://triton"], resolve=resolve)
    assert found_by.changes
    wanted = ["http://a:1", "grpc://10.0.0.1:8001", "grpc://10.0.0.2:8001", "grpc://[fd00::1]:8001"]
    assert asyncio.run(found_by.urls()) == (wanted, "")
    found.clear()
    there, lacking = asyncio.run(found_by.urls())
    assert there == wanted  # those of before
    assert lacking == "--upstream: triton has no address: Name or service not known"
    there, _ = asyncio.run(Discovery(found_by.given, resolve=resolve).urls())
    assert there == ["http://a:1"]


@pytest.mark.parametrize(("url", "name"), [("https://a:8443/p", "a"), ("grpcs://a#b.c", "b.c")])
def test_over_tls_an_addresss_certificate_is_that_of_its_name(url: str, name: str) -> None:
    async def resolve(*_: Any) -> list[str]:
        return ["10.0.0.1", "fd00::1"]

    there, _ = asyncio.run(Discovery([f"dns+{url}"], resolve=resolve).urls())
    scheme, port = url.partition(":")[0], 8443 if name == "a" else 443
    path = "/p" if name == "a" else ""
    assert there == [
        f"{scheme}://10.0.0.1:{port}{path}#{name}",
        f"{scheme}://[fd00::1]:{port}{path}#{name}",
    ]


@pytest.mark.parametrize("first", [socket.AF_INET, socket.AF_INET6])
def test_a_server_with_addresses_of_both_families_is_one_upstream(
    first: socket.AddressFamily, monkeypatch: pytest.MonkeyPatch
) -> None:
    hosts = {socket.AF_INET: ["10.0.0.1", "10.0.0.2"], socket.AF_INET6: ["fd00::1", "fd00::2"]}

    def look_up(name: str, port: int, *_: Any, **__: Any) -> list[Any]:
        found = [
            (family, socket.SOCK_STREAM, 6, "", (host, port))
            for family, own in hosts.items()
            for host in own
        ]
        return sorted(found, key=lambda address: address[0] != first)

    monkeypatch.setattr(socket, "getaddrinfo", look_up)
    there, _ = asyncio.run(Discovery(["dns+http://triton:1"]).urls())
    named = {socket.AF_INET: "10.0.0.{}", socket.AF_INET6: "[fd00::{}]"}[first]
    assert there == [f"http://{named.format(i)}:1" for i in (1, 2)]


def test_a_name_without_an_address_keeps_no_other_from_changing() -> None:
    places = {"main": ["10.0.0.1"]}

    async def resolve(host: str, port: int) -> list[str]:
        if host not in places:
            raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")
        return places[host]

    found_by = Discovery(["dns+http://main:1", "dns+http://canary:1"], resolve=resolve)
    assert asyncio.run(found_by.urls())[0] == ["http://10.0.0.1:1"]
    places["main"] = ["10.0.0.2"]
    there, lacking = asyncio.run(found_by.urls())
    assert there == ["http://10.0.0.2:1"]
    assert "canary has no address" in lacking


@pytest.mark.parametrize(
    "url",
    [
        "dns+ftp://a",
        "dns+http://",
        "dns+https://a#b..c",
        "dns+http://a:b",
        "dns+",
        "dns+http://a..b:8",
    ],
)
def test_urls_that_are_none(url: str) -> None:
    with pytest.raises(UserError, match="--upstream: "):
        asyncio.run(Discovery([url]).urls())


def test_files_without_upstreams(tmp_path: Path) -> None:
    file = tmp_path / "upstreams"
    with pytest.raises(UserError, match="--upstreams-file: cannot read"):
        asyncio.run(Discovery([], file).urls())
    file.write_text("https://10.0.0.3#a # the third\n\t# none\n")
    assert asyncio.run(Discovery([], file).urls()) == (["https://10.0.0.3#a"], "")
    file.write_text("# none\n")
    there, lacking = asyncio.run(Discovery([], file).urls())
    assert there == []
    assert "has no upstream" in lacking
    assert not Discovery(["http://a"]).changes
