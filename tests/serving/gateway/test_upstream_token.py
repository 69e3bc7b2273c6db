"""The gateway before upstreams that want a token."""

from __future__ import annotations

from pathlib import Path

import pytest

from codedinvnet.errors import UserError
from codedinvnet.serving.gateway.options import GatewayOptions
from codedinvnet.serving.gateway.run import running
from tests.observing import until
from tests.serving.gateway.asking import ask, ask_grpc, is_up, request
from tests.serving.gateway.fakes import Fake, GrpcFake, gateway

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
        file.write_text("new")
        await until(lambda: all(is_up(relay)))
        assert (await ask(address)).status == 200


@BOTH
async def test_a_token_that_lacks_is_asked_for(kind: type[Fake | GrpcFake], tmp_path: Path) -> None:
    fake = kind()
    fake.token = "secret"
    await fake.start()

    with pytest.raises(UserError, match=r"it wants a token, or another one: .*who are you"):
        async with running(GatewayOptions("m", upstream=(fake.url,), port=0)):
            pass
    missing = tmp_path / "missing"
    with pytest.raises(UserError, match="--upstream-token-file: cannot read"):
        async with running(
            GatewayOptions("m", upstream=(fake.url,), port=0, upstream_token_file=missing)
        ):
            pass
    await fake.stop()
