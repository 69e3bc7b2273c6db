"""`serve` over TLS, over HTTP and gRPC, with a certificate that is renewed."""

from __future__ import annotations

import asyncio
import shutil
import ssl
from pathlib import Path
from typing import Any

import aiohttp
import grpc
import numpy as np
import pytest
import tritonclient.grpc.aio as triton

from codedinvnet.common.errors import UserError
from codedinvnet.net.listening import free_port
from codedinvnet.serving.app import open_app, running
from codedinvnet.serving.config import ServeOptions
from tests.gateway.test_run import make_pair
from tests.models.factories import PLACE

pytestmark = pytest.mark.skipif(not shutil.which("openssl"), reason="openssl is not installed")
OPTIONS: dict[str, Any] = {
    "source": f"{PLACE}:mlp",
    "pool": "examples/my_pool.py:Pool",
    "workers": 2,
    "port": 0,
}


async def ready(url: str, chain: Path) -> int:
    trusted = ssl.create_default_context(cafile=str(chain))
    async with (
        aiohttp.ClientSession() as session,
        session.get(f"{url}/v2/health/ready", ssl=trusted) as reply,
    ):
        return reply.status


async def test_http_and_grpc_over_tls(tmp_path: Path) -> None:
    port, pair = free_port(), make_pair(tmp_path)
    chain = pair["tls_cert"]
    options = ServeOptions(**OPTIONS, grpc_port=port, **pair)
    async with running(options) as (url, _):
        assert url.startswith("https://")
        assert await ready(url, chain) == 200
        tensor = triton.InferInput("input", [2, 16], "FP32")
        tensor.set_data_from_numpy(np.zeros((2, 16), np.float32))
        known = grpc.ssl_channel_credentials(chain.read_bytes())
        async with triton.InferenceServerClient(f"127.0.0.1:{port}", creds=known) as client:
            answer = await client.infer("mlp", [tensor])
        assert set(answer.as_numpy("outcome")) == {b"direct"}

        make_pair(tmp_path)  # a renewed one is used for new connections

        async def renewed() -> bool:
            try:
                return await ready(url, chain) == 200
            except aiohttp.ClientSSLError:
                return False

        for _ in range(100):
            if await renewed():
                break
            await asyncio.sleep(0.1)
        assert await renewed()


def test_files_that_are_no_pair(tmp_path: Path) -> None:
    (tmp_path / "two").mkdir()
    chain, key = make_pair(tmp_path)["tls_cert"], make_pair(tmp_path / "two")["tls_key"]
    cases: tuple[tuple[dict[str, Any], str], ...] = (
        ({"tls_cert": chain}, "--tls-cert and --tls-key: one needs the other"),
        ({"tls_cert": chain, "tls_key": key}, "--tls-cert: .* are not a pair"),
        ({"tls_cert": tmp_path / "no", "tls_key": key}, "--tls-cert: cannot read"),
    )
    for given, message in cases:
        with pytest.raises(UserError, match=message):
            open_app(ServeOptions(**OPTIONS, **given))
