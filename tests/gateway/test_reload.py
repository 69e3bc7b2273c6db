"""SIGHUP: a gateway goes on by another configuration, or by the old one if that is wrong."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import ssl
from pathlib import Path
from typing import Any

import pytest

from codedinvnet.net.client import HttpClient, parse_origin
from codedinvnet.net.listening import free_port
from tests.gateway.support import INFER, V2, Process, process
from tests.gateway.test_run import make_pair
from tests.observing import until
from tests.processes import needs_proc, survivors
from tests.upstream import Request, Upstream, answer

pytestmark = [pytest.mark.timeout(60)]
CHUNKED = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n1\r\nx\r\n"


class Config:
    """A gateway's configuration file."""

    def __init__(self, path: Path, **options: Any) -> None:
        self.path, self.options = path, options
        self.write()

    def write(self, **changed: Any) -> None:
        self.options |= changed
        named = {name.replace("_", "-"): value for name, value in self.options.items()}
        self.path.write_text(json.dumps(named, default=str))

    async def reload(self, one: Process, **changed: Any) -> dict[str, Any]:
        """Return what the gateway logs when it is to go on by other options."""
        self.write(**changed)
        one.process.send_signal(signal.SIGHUP)
        return await one.event("reloaded", "not reloaded")


async def test_requests_under_way_end_as_they_began_and_new_ones_go_by_the_new_options(
    tmp_path: Path,
) -> None:
    finished = asyncio.Event()

    async def handle(request: Request, writer: asyncio.StreamWriter) -> bytes | None:
        if request.path in ("/stream", "/stalls"):
            writer.write(CHUNKED)
            await finished.wait()
            await asyncio.sleep(60.0 if request.path == "/stalls" else 0.0)
            return b"1\r\ny\r\n0\r\n\r\n"
        if request.path == "/long":
            await finished.wait()
        if request.path == "/late":
            await asyncio.sleep(1.0)
        return answer(request.body or b"ok")

    async with Upstream(handle) as stays, Upstream(handle) as goes, Upstream(handle) as comes:
        config = Config(
            tmp_path / "c.json", upstream=[stays.url, goes.url], route=["POST /stalls idle=1s"]
        )
        async with process(None, "--config", str(config.path)) as one:

            async def ask(path: str, method: str = "GET") -> bytes:
                return (await one.client.ask(method, path, 20.0, INFER)).body

            asked: list[asyncio.Task[bytes]] = []

            async def begin(path: str) -> asyncio.Task[bytes]:
                """Return a request that the upstream has which will be removed."""
                while True:
                    before = len(goes.requests)
                    asked.append(asyncio.create_task(ask(path, "POST")))
                    await asyncio.sleep(0.1)
                    if len(goes.requests) > before:
                        return asked[-1]

            for _ in range(20):
                await ask(V2, "POST")
            long, stream, stalls = [await begin(path) for path in ("/long", "/stream", "/stalls")]
            said = await config.reload(
                one,
                upstream=[stays.url, comes.url],
                route=["POST /late deadline=300ms"],
                slots=8,
                access_log="json",
            )
            assert said["event"] == "reloaded"
            assert set(said["changed"]) == {"upstream", "route", "access-log"}
            assert said["needs_restart"] == ["slots"]
            before = len(goes.requests)
            await until(lambda: bool(comes.probes))
            while not comes.requests:
                assert await ask(V2, "POST") == INFER
            assert len(goes.requests) == before
            status = json.loads(await ask("/codedinvnet/status"))
            times = {each["url"]: each["p50_ms"] for each in status["upstreams"]}
            assert set(times) == {stays.url, comes.url}
            assert times[stays.url] > 0
            assert not long.done()
            assert not stream.done()
            finished.set()
            assert await long == INFER
            assert await stream == b"xy"
            assert isinstance((await asyncio.gather(stalls, return_exceptions=True))[0], OSError)
            await asyncio.gather(*asked, return_exceptions=True)
            assert (await one.client.ask("POST", "/late", 20.0, INFER)).status == 504
            assert one.process.stdout is not None
            assert json.loads(await one.process.stdout.readline())["path"] == V2
            one.process.terminate()
            await one.end()


async def test_a_wrong_configuration_changes_nothing(tmp_path: Path) -> None:
    async with Upstream() as upstream, Upstream() as other:
        config = Config(tmp_path / "c.json", upstream=[upstream.url])
        usual = dict(config.options)
        async with process(None, "--config", str(config.path)) as one:
            for wrong, reason in (
                ({"route": ["PSOT /x"]}, "'PSOT /x'"),
                ({"upstream": [other.url, "nothing"]}, "'nothing'"),
                ({"upstream": [other.url, "dns+http://none.invalid:80"]}, "none.invalid"),
                ({"upstreams_file": "/none"}, "/none"),
                ({"token_file": "/none"}, "/none"),
                ({"upstreams": []}, "did you mean"),
                ({"upstream": ["grpc://a:1"], "grpc_port": 0}, "grpc-port"),
            ):
                config.options = dict(usual)
                said = await config.reload(one, **({"upstream": [other.url]} | wrong))
                assert said["event"] == "not reloaded"
                assert reason in said["reason"]
            config.path.write_text("{")
            one.process.send_signal(signal.SIGHUP)
            assert (await one.event("reloaded", "not reloaded"))["event"] == "not reloaded"
            assert (await one.client.ask("POST", "/x", 5.0, INFER)).body == INFER
            config.options = dict(usual)
            assert (await config.reload(one))["changed"] == []
            assert (await one.client.ask("POST", "/x", 5.0, INFER)).body == INFER
            one.process.terminate()
            await one.end()
        assert len(upstream.requests) == 2
        assert not other.requests


async def test_other_tokens_and_certificates(tmp_path: Path) -> None:
    pairs = []
    for name in ("old", "new"):
        (tmp_path / name).mkdir()
        pairs.append(make_pair(tmp_path / name))
        (tmp_path / name / "token").write_text(f"{name}-token")
    async with Upstream() as upstream:
        config = Config(
            tmp_path / "c.json",
            upstream=[upstream.url],
            token_file=tmp_path / "old" / "token",
            **pairs[0],
        )
        async with process(None, "--config", str(config.path)) as one:

            async def status(pair: dict[str, Any], token: str) -> int:
                context = ssl.create_default_context(cafile=str(pair["tls_cert"]))
                client = HttpClient(one.client.origin, context)
                try:
                    bearer = [("authorization", f"Bearer {token}")]
                    return (await client.ask("GET", "/", 5.0, headers=bearer)).status
                except ssl.SSLError:
                    return 0
                finally:
                    client.close()

            assert await status(pairs[0], "old-token") == 200
            own = tmp_path / "new" / "token"
            said = await config.reload(one, token_file=own, upstream_token_file=own, **pairs[1])
            assert set(said["changed"]) == {
                "token-file", "upstream-token-file", "tls-cert", "tls-key"
            }  # fmt: skip
            while not await status(pairs[1], "new-token"):
                await asyncio.sleep(0.1)
            assert await status(pairs[1], "new-token") == 200
            assert upstream.requests[-1].fields["authorization"] == "Bearer new-token"
            assert await status(pairs[1], "old-token") == 401
            assert await status(pairs[0], "new-token") == 0
            own.write_text("newest-token")
            assert set((await config.reload(one))["changed"]) == {
                "token-file", "upstream-token-file"
            }  # fmt: skip
            assert await status(pairs[1], "newest-token") == 200
            said = await config.reload(one, tls_cert=None, tls_key=None)
            assert said["needs_restart"] == ["tls-cert", "tls-key"]
            one.process.terminate()
            await one.end()


@needs_proc
async def test_each_of_several_processes_reloads(tmp_path: Path) -> None:
    admin = free_port()
    async with Upstream() as old, Upstream() as new:
        config = Config(
            tmp_path / "c.json", upstream=[old.url], processes=2, admin_port=admin, port=free_port()
        )
        words = ("--config", str(config.path), "--port", str(config.options["port"]))
        async with process(None, *words) as one:

            async def has(number: int, url: str) -> bool:
                client = HttpClient(parse_origin(f"http://127.0.0.1:{admin + number}"))
                try:
                    found = await client.ask("GET", "/codedinvnet/status", 2.0)
                except OSError:
                    return False
                finally:
                    client.close()
                status = json.loads(found.body)
                joined = status["members"]["decides_for"] in (0, 2)
                return joined and [each["url"] for each in status["upstreams"]] == [url]

            async def all_have(url: str) -> None:
                while not (await has(0, url) and await has(1, url)):
                    await asyncio.sleep(0.05)

            await all_have(old.url)
            said = await config.reload(one, upstream=[new.url])
            assert (said["changed"], said["needs_restart"]) == (["upstream"], [])
            await all_have(new.url)
            children = Path(f"/proc/{one.process.pid}/task/{one.process.pid}/children")
            victim = int(children.read_text().split()[0])
            os.kill(victim, signal.SIGKILL)
            assert not await asyncio.to_thread(survivors, [victim])
            await asyncio.sleep(1.0)
            await all_have(new.url)
            assert (await one.client.ask("POST", "/x", 5.0, INFER)).body == INFER
            one.process.terminate()
            await one.end()
