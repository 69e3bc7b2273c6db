"""What the gateway refuses at its start, and whom it waits for."""

from __future__ import annotations

import asyncio
import contextlib
import json
import resource
from dataclasses import replace
from pathlib import Path
from typing import Any

import aiohttp
import grpc
import pytest
from tritonclient.grpc import service_pb2 as pb

from codedinvnet.errors import UserError
from codedinvnet.serving.faces.connections import FEWEST_CONNECTIONS
from codedinvnet.serving.gateway.options import GatewayOptions, check
from codedinvnet.serving.gateway.run import _run
from tests.observing import until
from tests.serving.gateway.asking import ask, is_up
from tests.serving.gateway.fakes import TENSORS, Fake, GrpcFake, gateway

NOBODY = "http://127.0.0.1:1"


async def refused(*fakes: Fake | GrpcFake, **options: Any) -> str:
    with pytest.raises(UserError) as error:
        async with gateway(*fakes, **options):
            pass
    text = str(error.value)
    assert "\n" not in text
    return text


async def test_upstreams_that_do_not_fit_are_refused_at_the_start() -> None:
    wide, lacking, other = Fake(), Fake(), Fake()
    inputs = [{"name": "x", "datatype": "FP32", "shape": [-1, 4]}]
    wide.metadata = {**TENSORS, "name": "m", "inputs": inputs}
    lacking.metadata = None
    other.metadata = "<html>"
    assert "no model 'm'" in await refused(lacking)
    assert "Open Inference Protocol" in await refused(other)
    assert "none answers" in await refused(upstream=(NOBODY,))


@pytest.mark.parametrize("first", [0, 1, 2])
async def test_who_has_another_model_than_most_is_not_asked(
    first: int, caplog: pytest.LogCaptureFixture
) -> None:
    """One bad server, or a rolling update, must not keep a gateway from its start."""
    good, wide, _, lacking = fakes = [Fake() for _ in range(4)]
    inputs = [{"name": "x", "datatype": "FP32", "shape": [-1, 4]}]
    wide.metadata = {**TENSORS, "name": "m", "inputs": inputs}
    lacking.metadata = None
    fakes = [*fakes[first:], *fakes[:first]]

    async with gateway(*fakes) as (address, relay, _):
        await until(lambda: is_up(relay).count(False) == 2)
        for _ in range(20):
            assert (await ask(address)).status == 200
        assert len(wide.seen) == len(lacking.seen) == 0
        told = "\n".join(json.dumps(vars(record), default=str) for record in caplog.records)
        assert "inputs 'x': FP32 [-1, 4] and FP32 [-1, 3]" in told
        assert "no model 'm'" in told
        wide.metadata = lacking.metadata = good.metadata
        await until(lambda: is_up(relay) == [True] * 4)


async def test_where_others_may_come_none_need_have_the_model_yet(tmp_path: Path) -> None:
    fake, file = Fake(), tmp_path / "upstreams"
    fake.metadata, mine = None, fake.metadata
    await fake.start()
    file.write_text(fake.url)

    async with gateway(upstreams_file=file) as (address, relay, _):
        await until(lambda: relay.front.scheduler.workers_up == 0)
        fake.metadata = mine
        await until(lambda: relay.front.scheduler.workers_up == 1)
        assert (await ask(address)).status == 200
    await fake.stop()


async def test_a_rolling_update_to_another_model_ends_well(tmp_path: Path) -> None:
    """Those that have it wait until none of before is left, and serve then."""
    old, new = [Fake(), Fake()], [Fake(), Fake()]
    for fake in new:
        fake.metadata = {**TENSORS, "name": "m", "versions": ["2"], "outputs": TENSORS["inputs"]}
    file = tmp_path / "upstreams"
    for fake in (*old, *new):
        await fake.start()
    file.write_text("\n".join(fake.url for fake in old))

    options: dict[str, Any] = {"upstreams_file": file, "deadline_ms": 1000}
    async with gateway(**options) as (address, relay, _), aiohttp.ClientSession() as web:
        file.write_text("\n".join(fake.url for fake in (old[0], *new)))
        await until(lambda: all(fake.probes > 1 for fake in new))
        await old[0].stop()  # for a while: it still has what is right
        assert (await ask(address)).status == 504
        assert not any(is_up(relay))
        await until(lambda: all(fake.probes > 3 for fake in new))
        assert not any(is_up(relay))
        await old[0].start()
        await until(lambda: any(is_up(relay)))
        assert (await ask(address)).status == 200
        file.write_text("\n".join(fake.url for fake in new))
        await until(lambda: is_up(relay).count(True) == 2)
        assert (await ask(address)).status == 200
        async with web.get(f"{address}/v2/models/m") as reply:
            assert (await reply.json())["versions"] == ["2"]
        assert sum(len(fake.seen) for fake in new) == 1
    for fake in (*old, *new):
        await fake.stop()


@pytest.mark.parametrize(
    "server", ["http://127.0.0.1:8101", "grpc://a", "http://a:1/prefix", "dns+http://localhost:9"]
)
async def test_the_url_of_a_model_is_refused_with_that_of_its_server(server: str) -> None:
    """Other commands take it."""
    told = await refused(upstream=(f"{server}/v2/models/m",))
    assert told.startswith("--upstream: ")
    assert told.endswith(f"name the server alone: {server}")


async def test_one_that_is_away_at_the_start_comes_later() -> None:
    good, late = Fake(), Fake()

    await late.start()
    await late.stop()
    async with gateway(good, late) as (address, relay, _):
        await until(lambda: is_up(relay) == [True, False])
        assert (await ask(address)).status == 200
        await late.start()
        await until(lambda: is_up(relay) == [True, True])


async def test_one_that_fails_at_the_start_comes_later() -> None:
    """As a proxy without a server behind it does, or a server that loads its model."""
    good, loading, busy = Fake(), Fake(), GrpcFake()
    loading.ready, loading.metadata_status = False, 503
    busy.ready, busy.metadata_code = b"", grpc.StatusCode.INTERNAL

    async with gateway(good, loading, busy) as (address, relay, _):
        await until(lambda: is_up(relay) == [True, False, False])
        assert (await ask(address)).status == 200
        loading.ready, loading.metadata_status = True, 200
        busy.ready = pb.ModelReadyResponse(ready=True).SerializeToString()
        busy.metadata_code = grpc.StatusCode.OK
        await until(lambda: is_up(relay) == [True, True, True])
    alone = Fake()
    alone.metadata_status = 502
    assert "status 502" in await refused(alone)


@pytest.mark.parametrize("listed", [True, False])
async def test_where_others_may_come_nobody_need_be_there_at_the_start(
    listed: bool, tmp_path: Path
) -> None:
    """Else an outage of all upstreams would end gateways for longer than it lasts."""
    late, file = Fake(), tmp_path / "upstreams"

    await late.start()
    await late.stop()
    file.write_text(late.url if listed else "# none yet")
    async with gateway(upstreams_file=file) as (address, relay, _), aiohttp.ClientSession() as web:

        async def status(path: str) -> int:
            async with web.get(address + path) as reply:
                return reply.status

        await until(lambda: relay.front.scheduler.workers_up == 0)
        assert await status("/v2/health/ready") == 503
        assert await status("/v2/models/m") == 503
        await until(lambda: relay.front.supervisor.is_down)
        assert (await ask(address)).status == 503
        await late.start()
        file.write_text(late.url)
        await until(lambda: relay.front.scheduler.workers_up == 1)
        assert await status("/v2/health/ready") == 200
        assert await status("/v2/models/m") == 200
        assert (await ask(address)).status == 200
    await late.stop()
    assert "no upstream" in await refused(
        upstreams_file=Path("/dev/null"), backup_upstream="http://a/v2/models/m"
    )


async def test_another_is_asked_for_metadata_where_one_fails() -> None:
    failing, good = Fake(), Fake()

    async with gateway(failing, good) as (address, *_):
        failing.metadata_status = 503
        async with aiohttp.ClientSession() as session:
            async with session.get(f"{address}/v2/models/m/versions/1") as reply:
                assert reply.status == 200
            good.metadata_status = 502
            async with session.get(f"{address}/v2/models/m/versions/2") as reply:
                assert reply.status == 503
            failing.metadata = None
            async with session.get(f"{address}/v2/models/m/versions/3") as reply:
                assert reply.status == 404


@pytest.mark.parametrize(
    ("options", "flag"),
    [
        ({"upstream": ()}, "--upstream"),
        ({"upstream": ("ftp://a",)}, "--upstream"),
        ({"upstream": ("http://:80",)}, "--upstream"),
        ({"upstream": ("http://a:b",)}, "--upstream"),
        ({"upstream": ("http://a..b:8000",)}, "--upstream"),
        ({"upstream": ("http://127.0.0.1:1", f"grpc://{64 * 'a'}:8001")}, "--upstream"),
        ({"upstream": ("grpc://a/b",)}, "--upstream"),
        ({"upstream": ("http://u:p@a",)}, "--upstream"),
        ({"upstream": ("http://a", "http://a")}, "--upstream"),
        ({"upstream": ("http://a",), "policy": "replicate", "slots": 1}, "--upstream"),
        ({"upstream": ("http://a",), "policy": "coded"}, "--policy"),
        ({"upstream": ("http://a",), "slots": 0}, "--slots"),
        ({"upstream": ("http://a",), "grpc_port": 70000}, "--grpc-port"),
        ({"upstream": ("http://a",), "deadline_ms": float("nan")}, "--deadline-ms"),
        ({"upstream": ("http://a",), "deadline_ms": 0}, "--deadline-ms"),
        ({"upstream": ("http://a",), "method": "nercc", "deadline_ms": 0}, "--deadline-ms"),
        ({"upstream": ("http://a",), "method": "nercc", "deadline_ms": 20}, "--group-timeout-ms"),
        ({"upstream": ("http://a",), "group_timeout_ms": 10}, "--group-timeout-ms"),
        ({"upstream": ("http://a",), "k": 3}, "--k"),
        ({"upstream": ("http://a",), "scores": "y"}, "--scores"),
        ({"upstream": ("http://a",), "inputs": ("x:FP32:3",)}, "--input"),
        ({"upstream": ("http://a",), "backup_workers": 5}, "--backup-workers"),
        ({"upstream": ("http://a",), "protection": "p", "scores": "y"}, "--scores"),
        (
            {
                "upstream": ("http://a",),
                "backup_upstream": "http://b/v2/models/m",
                "backup_workers": 1,
            },
            "--backup-workers",
        ),
    ],
)
async def test_bad_options(options: dict[str, Any], flag: str) -> None:
    assert (await refused(**options)).startswith(f"{flag}: ")


async def test_a_name_that_no_url_leads_to_is_for_grpc() -> None:
    options = GatewayOptions("team/resnet", ("grpc://a",))
    with pytest.raises(UserError, match="NAME: no URL over HTTP leads to 'team/resnet'"):
        check(options)
    check(replace(options, grpc_port=0))


async def test_no_group_is_waited_for_where_there_is_none() -> None:
    """A short deadline needs no shorter time for groups."""
    fake = Fake()

    async with gateway(fake, deadline_ms=20):
        pass


@pytest.mark.parametrize(
    ("makes_up", "told"), [({}, [False]), ({"backup_upstream": f"{NOBODY}/v2/models/m"}, [True])]
)
async def test_who_lets_everybody_have_approximate_answers_is_told(
    makes_up: dict[str, Any], told: list[bool], caplog: pytest.LogCaptureFixture
) -> None:
    """Upstreams that want a token of each client are not asked for these."""
    with pytest.raises(UserError, match="none answers"):
        await _run(GatewayOptions("m", upstream=(NOBODY,), host="0.0.0.0", **makes_up))
    reasons = [vars(r)["fields"]["reason"] for r in caplog.records if r.msg == "no token"]
    assert ["approximate" in reason for reason in reasons] == told


async def test_an_address_of_another_protocol_is_not_asked() -> None:
    assert "'ftp://a:1' is not one of http://HOST:PORT" in await refused(upstream=("ftp://a:1",))


async def test_connections_to_upstreams_leave_less_room_for_clients(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda _: (1024, 1024))
    async with gateway(Fake(), Fake(), slots=500) as (address, _, _):
        host, port = address.removeprefix("http://").split(":")
        kept = [await asyncio.open_connection(host, port) for _ in range(FEWEST_CONNECTIONS)]
        reader, writer = await asyncio.open_connection(host, port)
        with contextlib.suppress(ConnectionResetError):  # sooner than for its silence
            assert await asyncio.wait_for(reader.read(), 5) == b""
        for _, other in (*kept, (reader, writer)):
            other.close()
