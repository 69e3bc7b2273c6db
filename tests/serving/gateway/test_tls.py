"""TLS on both sides: a gateway with a certificate, as two upstreams of another."""

from __future__ import annotations

import asyncio
import shutil
import ssl
import subprocess
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from codedinvnet.errors import UserError
from codedinvnet.serving.faces import connections, tls
from codedinvnet.serving.faces.tls import read_certificate
from codedinvnet.serving.gateway.options import GatewayOptions
from codedinvnet.serving.gateway.run import running
from tests.observing import until
from tests.serving.gateway.asking import ask
from tests.serving.gateway.fakes import Fake, gateway

pytestmark = pytest.mark.skipif(not shutil.which("openssl"), reason="openssl is not installed")


def make_pair(folder: Path, *options: str, name: str = "IP:127.0.0.1") -> tuple[Path, Path]:
    """Return a certificate of 127.0.0.1, or of a name, signed by itself, and its key."""
    folder.mkdir()
    chain, key = folder / "cert.pem", folder / "key.pem"
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-days", "2", "-keyout", str(key)]
    command += ["-out", str(chain), "-subj", "/CN=here", *(options or ("-nodes",))]
    command += ["-addext", f"subjectAltName={name}"]
    subprocess.run(command, check=True, capture_output=True, timeout=60)
    return chain, key


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return make_pair(tmp_path_factory.mktemp("tls") / "pair")


async def test_both_sides(pair: tuple[Path, Path]) -> None:
    chain, key = pair
    fake = Fake()

    async with gateway(fake, tls_cert=chain, tls_key=key, grpc_port=0) as (url, _, port):
        assert url.startswith("https://")
        trusted = ssl.create_default_context(cafile=str(chain))
        async with (
            aiohttp.ClientSession() as session,
            session.get(f"{url}/v2/health/ready", ssl=trusted) as reply,
        ):
            assert reply.status == 200
        for upstream in (url, f"grpcs://127.0.0.1:{port}"):
            options = GatewayOptions("m", upstream=(upstream,), port=0, upstream_ca=chain)
            async with running(options) as (address, *_rest):
                assert (await ask(address)).status == 200
        options = GatewayOptions("m", upstream=(url,), port=0)
        with pytest.raises(UserError, match=r"none answers: .*certificate"):
            async with running(options):
                pass
    assert len(fake.seen) == 2


async def test_an_upstreams_certificate_may_be_that_of_another_name(tmp_path: Path) -> None:
    """That of a service, where upstreams are its addresses."""
    chain, key = make_pair(tmp_path / "named", "-nodes", name="DNS:models.test")

    theirs: dict[str, Any] = {"tls_cert": chain, "tls_key": key, "allowed_host": ("models.test",)}
    async with gateway(Fake(), grpc_port=0, **theirs) as (url, _, port):
        for upstream in (url, f"grpcs://127.0.0.1:{port}"):
            for end in ("#models.test", "", "#other.test"):
                told = (f"{upstream}{end}",)
                options = GatewayOptions("m", upstream=told, port=0, upstream_ca=chain)
                if end == "#models.test":
                    async with running(options) as (address, *_rest):
                        assert (await ask(address)).status == 200
                else:
                    with pytest.raises(UserError, match="none answers"):
                        async with running(options):
                            pass


async def test_a_renewed_certificate_is_served(
    pair: tuple[Path, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """What is no pair, as between two writes, changes nothing."""
    monkeypatch.setattr(tls, "PERIOD", 0.02)
    chain, key = tmp_path / "cert.pem", tmp_path / "key.pem"
    for target, source in zip((chain, key), pair, strict=True):
        shutil.copy(source, target)
    later = make_pair(tmp_path / "later")

    async with gateway(Fake(), tls_cert=chain, tls_key=key, grpc_port=0) as (url, _, port):
        assert port is not None
        ports = int(url.rpartition(":")[2]), port

        async def served() -> list[str]:
            return [
                await asyncio.to_thread(ssl.get_server_certificate, ("127.0.0.1", number))
                for number in ports
            ]

        old, new = (file.read_text() for file in (pair[0], later[0]))
        assert await served() == [old, old]
        shutil.copy(later[0], chain)
        await until(lambda: "the old certificate is kept" in caplog.messages)
        assert await served() == [old, old]
        shutil.copy(later[1], key)
        end = time.monotonic() + 20
        while await served() != [new, new]:
            assert time.monotonic() < end


async def test_clients_that_begin_no_handshake(
    pair: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connections, "HEAD_TIMEOUT", 0.3)
    chain, key = pair

    async with gateway(Fake(), tls_cert=chain, tls_key=key, grpc_port=0) as (url, _, port):
        for number in (int(url.rpartition(":")[2]), port):
            reader, writer = await asyncio.open_connection("127.0.0.1", number)
            with suppress(ConnectionError):
                assert await asyncio.wait_for(reader.read(), 20) == b""
            writer.close()


def test_certificates_that_do_not_match(pair: tuple[Path, Path], tmp_path: Path) -> None:
    chain, key = pair
    other, _ = make_pair(tmp_path / "other")
    _, locked = make_pair(tmp_path / "locked", "-passout", "pass:secret")
    assert read_certificate(None, None) is None
    assert read_certificate(chain, key) is not None
    for one, two in ((other, key), (chain, locked), (key, key)):
        with pytest.raises(UserError, match="are not a pair"):
            read_certificate(one, two)
    with pytest.raises(UserError, match="--tls-key: cannot read"):
        read_certificate(chain, tmp_path / "none")
    with pytest.raises(UserError, match="one needs the other"):
        read_certificate(chain, None)
