"""The gateway before upstreams that want a token."""

from __future__ import annotations

import asyncio
from pathlib import Path

import aiohttp
import grpc
import pytest

from codedinvnet.errors import UserError
from codedinvnet.serving.gateway import run, upstream_token
from codedinvnet.serving.gateway.options import GatewayOptions
from codedinvnet.serving.gateway.run import running
from codedinvnet.serving.gateway.upstream_token import UpstreamToken
from tests.observing import until
from tests.serving.gateway.asking import ask, ask_grpc, is_up, request
from tests.serving.gateway.fakes import Fake, GrpcFake, gateway
from tests.serving.gateway.servers import Server

BOTH = pytest.mark.parametrize("kind", [Fake, GrpcFake])


@BOTH
async def test_upstreams_get_their_token_and_no_clients(
    kind: type[Fake | GrpcFake], tmp_path: Path
) -> None:
    fake, theirs, own = kind(), tmp_path / "theirs", tmp_path / "own"
    fake.token = "for upstreams"
    theirs.write_text("for upstreams\n")
    own.write_text("for clients")

    options = {"upstream_token_file": theirs, "grpc_port": 0}
    async with gateway(fake, **options) as (address, _, port):
        assert (await ask(address)).status == 200
        assert (await ask(address, authorization="Bearer mine")).status == 200
        await ask_grpc(port, request(bytes(12)))
        await ask_grpc(port, request(bytes(12)), authorization="Bearer mine")
    fake.port = 0
    async with gateway(fake, token_file=own, **options) as (address, _, port):
        assert (await ask(address)).status == 401
        assert (await ask(address, authorization="Bearer for clients")).status == 200
        await ask_grpc(port, request(bytes(12)), authorization="Bearer for clients")
    assert len(fake.seen) == 6


@BOTH
async def test_a_new_token_is_taken_from_its_file(
    kind: type[Fake | GrpcFake], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    fakes, file = (kind(), kind()), tmp_path / "token"
    for fake in fakes:
        fake.token = "old"
    file.write_text("old")

    async with gateway(*fakes, upstream_token_file=file) as (address, relay, _):
        assert (await ask(address)).status == 200
        file.write_text("two\nlines")
        await until(lambda: "upstreams' token is kept" in caplog.text)
        assert (await ask(address)).status == 200
        for fake in fakes:
            fake.token = "new"
        await until(lambda: not all(is_up(relay)))
        assert any("wants a token" in str(vars(record)) for record in caplog.records)
        file.write_text("new")
        await until(lambda: all(is_up(relay)))
        assert (await ask(address)).status == 200


async def test_that_the_token_is_kept_is_not_told_at_each_look(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(upstream_token, "PERIOD", 0.01)
    file, looks = tmp_path / "token", 0

    class Counting(UpstreamToken):
        def look(self) -> bool:
            nonlocal looks
            looks += 1
            return super().look()

    async def looked() -> None:
        before = looks
        await until(lambda: looks > before + 20)

    file.write_text("secret")
    monkeypatch.setattr(run, "UpstreamToken", Counting)
    async with gateway(Fake(), upstream_token_file=file):
        for _ in range(2):
            file.rename(tmp_path / "away")
            await looked()
            (tmp_path / "away").rename(file)
            await looked()
        assert caplog.messages.count("upstreams' token is kept") == 2


@BOTH
@pytest.mark.parametrize("guards_all", [True, False])
async def test_who_refuses_the_token_gets_no_requests(
    kind: type[Fake | GrpcFake], guards_all: bool, tmp_path: Path
) -> None:
    """It fails faster than others answer, and would draw most of them."""
    good, bad, file = kind(), kind(), tmp_path / "token"
    good.delay, bad.guards_all = 0.02, guards_all
    file.write_text("old")

    async with gateway(good, bad, upstream_token_file=file) as (address, relay, _):
        bad.token = "another"
        for _ in range(15):
            replies = await asyncio.gather(*(ask(address) for _ in range(8)))
            assert {reply.status for reply in replies} == {200}
        assert is_up(relay) == [True, False]
        assert bad.refused < 60
        bad.token = ""
        await until(lambda: all(is_up(relay)))


@BOTH
async def test_a_refused_token_is_no_fault_of_clients(
    kind: type[Fake | GrpcFake], tmp_path: Path
) -> None:
    fake, file = kind(), tmp_path / "token"
    file.write_text("old")

    options = {"upstream_token_file": file, "grpc_port": 0}
    async with gateway(fake, **options) as (address, _, port):
        fake.token, fake.guards_all = "new", False
        reply = await ask(address)
        assert (reply.status, reply.headers.get("www-authenticate")) == (503, None)
        assert b"wants a token, or another one (--upstream-token-file)" in reply.body
        with pytest.raises(grpc.aio.AioRpcError, match="another one") as refused:
            await ask_grpc(port, request(bytes(12)))
        assert refused.value.code() is grpc.StatusCode.UNAVAILABLE
        fake.guards_all = True
        path = "/v2/models/m/versions/2/ready"
        async with aiohttp.ClientSession(address) as session, session.get(path) as answer:
            assert answer.status == 503  # 404 would say that there is no such version
    fake.port, fake.token = 0, ""
    async with gateway(fake) as (address, _, _):  # clients show their own
        fake.token = "new"
        assert (await ask(address)).status == 401
        assert (await ask(address, authorization="Bearer new")).status == 200


@BOTH
async def test_a_token_that_lacks_is_asked_for(kind: type[Fake | GrpcFake], tmp_path: Path) -> None:
    fake = kind()
    fake.token = "secret"
    await fake.start()

    with pytest.raises(
        UserError, match=r"it wants a token, or another one \(--upstream-token-file\): .*who are"
    ):
        async with running(GatewayOptions("m", upstream=(fake.url,), port=0)):
            pass
    missing = tmp_path / "missing"
    with pytest.raises(UserError, match="--upstream-token-file: cannot read"):
        async with running(
            GatewayOptions("m", upstream=(fake.url,), port=0, upstream_token_file=missing)
        ):
            pass
    await fake.stop()


async def test_who_wants_a_token_for_a_question_of_the_gateway_has_not_answered_it() -> None:
    """That it has another model would switch the backup off."""
    server = Server()
    server.token, server.guards_all = "secret", False
    await server.start()
    url = f"{server.url}/v2/models/m"
    with pytest.raises(UserError, match=r"none answers: .*401"):
        async with running(
            GatewayOptions("m", upstream=(server.url,), port=0, backup_upstream=url)
        ):
            pass
    await server.stop()
