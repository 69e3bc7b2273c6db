"""The command: what it refuses, its own routes, TLS, and how it stops."""

from __future__ import annotations

import asyncio
import json
import re
import signal
import ssl
import subprocess
from pathlib import Path
from typing import Any

import pytest

from codedinvnet.cli import main
from codedinvnet.common.errors import UserError
from codedinvnet.gateway import calls
from codedinvnet.gateway.options import GatewayOptions
from codedinvnet.net.client import HttpClient, parse_origin
from tests.gateway.support import INFER, V2, gateway, process
from tests.observing import until
from tests.upstream import Request, Upstream, answer, saying

URL = "http://127.0.0.1:9"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("", "--upstream: at least one"), ("--upstream a:80", "grpc://"),
        (f"--upstream {URL} --upstream {URL}", "is there twice"),
        ("--upstream http://127.0.0.1:0", "http://HOST:PORT"),
        ("--upstream grpc://a:1", "--grpc-port"),
        (f"--upstream {URL} --grpc-port 0", "--grpc-port"),
        (f"--upstream {URL} --slots 0", "--slots: "),
        (f"--upstream {URL} --slots x", "--slots: must be a whole number, got x"),
        (f"--upstream {URL} --policy auto", "--policy"),
        (f"--upstream {URL} --policy coded", "uncoded, replicate, hedge"),
        (f"--upstream {URL} --route /x", "--route: '/x' is not 'METHOD GLOB'"),
        (f"--upstream {URL} --route POST", "--route"),
        (f"--upstream {URL} --hedge-delay-ms 9:5", "--hedge-delay-ms"),
        (f"--upstream {URL} --health healthz", "--health"),
        (f"--upstream {URL} --deadline-ms 0", "--deadline-ms"),
        (f"--upstream {URL} --deadline-ms inf", "--deadline-ms"),
        (f"--upstream {URL} --port 70000", "--port"),
        (f"--upstream {URL} --fallback x", "--fallback"),
        (f"--upstream {URL} --fallback {URL} --protection x", "--protection"),
        ("--upstream grpc://a:1 --grpc-port 0 --health /x", "--health: is for upstreams over HTTP"),
        (f"--upstream grpc://a:1 --grpc-port 0 --fallback {URL}", "--fallback: is for"),
        (f"--upstream {URL} --token-file /none", "--token-file"),
        (f"--upstream {URL} --upstream-token-file /none", "--upstream-token-file"),
        (f"--upstream {URL} --tls-key x", "--tls-key"),
        (f"--upstream {URL} --tls-cert /none", "--tls"),
        (f"--upstream {URL} --upstream-ca /dev/null", "--upstream-ca"),
        (f"--upstream {URL} --host 192.0.2.1", "cannot listen on"),
        ("--upstreams-file /none", "--upstreams-file"),
        ("--upstreams-file /dev/zero", "not a regular file"),
        ("--upstream grpc://a --grpc-port 0", "grpc://HOST:PORT"),
        (f"--upstream {URL} --config /none", "--config"),
    ],
)  # fmt: skip
def test_bad_options_end_with_one_line(
    words: str, said: str, capfd: pytest.CaptureFixture[str]
) -> None:
    assert main(["gateway", "--port", "0", *words.split()]) == 2
    out, err = capfd.readouterr()
    lines = [line for line in err.splitlines() if not line.startswith("{")]
    assert out == ""
    assert len(lines) == 1
    assert lines[0].startswith("error: ")
    assert said in lines[0]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ({"slot": 1}, "did you mean 'slots'"), ({"deadline_ms": 4}, "'deadline_ms'"),
        ({"slots": "4"}, "slots"), ({"slots": 1.5}, "slots"), ({"slots": True}, "slots"),
        ({"deadline-ms": 1e400}, "deadline-ms"), ({"upstream": URL}, "upstream"),
        ({"upstream": [1]}, "upstream"), ({"cancel": "maybe"}, "cancel"), ([], "object"),
        ({"upstream": [URL], "route": ["PSOT /x"]}, "c.json: route: 'PSOT /x'"),
    ],
)  # fmt: skip
def test_mistakes_in_a_file_are_one_line(content: Any, said: str, tmp_path: Path) -> None:
    (tmp_path / "c.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match=said) as error:
        from_file(tmp_path / "c.json")
    assert str(error.value).startswith("--config: ")


def test_a_file_says_what_the_command_line_does_not(tmp_path: Path) -> None:
    (tmp_path / "c.json").write_text(json.dumps({"slots": 2, "upstream": [URL], "host": "::1"}))
    found = from_file(tmp_path / "c.json", "--slots", "4")
    assert (found.slots, found.upstream, found.host) == (4, (URL,), "::1")
    assert found.deadline == 30.0


def from_file(path: Path, *words: str) -> GatewayOptions:
    from codedinvnet.cli.command_line import build_parser
    from codedinvnet.cli.options import options_of

    parsed = build_parser().parse_args(["gateway", "--config", str(path), *words])
    return options_of(parsed, GatewayOptions)


async def test_what_is_logged(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(calls, "SLOW", 0.0)
    caplog.set_level("INFO")
    good = Upstream()
    await good.start()
    async with gateway(good, upstream=(URL, good.url)) as g:
        for path in ("/predict", "/predict", V2):
            assert (await g.ask("POST", path, INFER)).body == INFER
        while "slow request" not in caplog.messages:  # of many alike, one a second is
            await g.ask("POST", "/predict", INFER)
            await asyncio.sleep(0.05)
    assert "no upstream is up" not in caplog.messages
    found = {record.getMessage(): record for record in caplog.records}
    (attempt,) = vars(found["slow request"])["fields"]["attempts"]
    assert (attempt["status"], attempt["result"]) == (200, "answered")
    assert caplog.messages.count("not hedged") == 1
    assert vars(found["not hedged"])["fields"]["hint"].endswith("--route 'POST /predict hedge=on'")
    async with gateway(good):
        assert any("there is one upstream" in message for message in caplog.messages)


async def test_own_routes_may_have_a_port_of_their_own() -> None:
    async with gateway(Upstream(), admin_port=0) as g:
        assert (await g.ask("GET", "/metrics")).body == b"/metrics"
        admin = HttpClient(parse_origin(g.gateway.admin_url))
        found = {
            path: (await admin.ask("GET", path, 5.0)).status
            for path in ("/metrics", "/livez", "/readyz", "/codedinvnet", "/other")
        }
        admin.close()

    assert found == {
        "/metrics": 200, "/livez": 200, "/readyz": 200, "/codedinvnet": 200, "/other": 404
    }  # fmt: skip


async def test_metrics_are_a_gateways_and_the_page_has_its_data() -> None:
    async with gateway(Upstream(), Upstream()) as g:
        for _ in range(30):
            await g.ask("POST", V2, INFER)
        text = (await g.ask("GET", "/metrics")).body.decode()
        names = {line.split(" ")[2] for line in text.splitlines() if line.startswith("# TYPE")}
        status = json.loads((await g.ask("GET", "/codedinvnet/status")).body)
        page = (await g.ask("GET", "/codedinvnet")).body

    assert all(name.startswith(("codedinvnet_gateway_", "process_")) for name in names)
    assert {one["up"] for one in status["upstreams"]} == {True}
    (route,) = status["routes"]
    assert route["name"] == f"POST {V2}"
    assert route["p50_ms"] > 0
    assert b"/codedinvnet/status" in page


@pytest.mark.parametrize(
    ("host", "body", "kind", "status"),
    [
        ("127.0.0.1", '{"policy": "uncoded"}', "application/json", 200),
        ("127.0.0.1", '{"policy": "replicate"}', "application/json", 200),
        ("127.0.0.1", '{"policy": "coded"}', "application/json", 400),
        ("127.0.0.1", '{"policy": 1}', "application/json", 400),
        ("127.0.0.1", "no", "application/json", 400),
        ("127.0.0.1", '{"policy": "uncoded"}', "text/plain", 415),
        ("0.0.0.0", '{"policy": "uncoded"}', "application/json", 403),
    ],
)
async def test_changing_the_policy(host: str, body: str, kind: str, status: int) -> None:
    async with gateway(Upstream(), host=host) as g:
        found = await g.ask("POST", "/codedinvnet/policy", body.encode(), Content_Type=kind)
        shown = json.loads((await g.ask("GET", "/codedinvnet/policy")).body)

    assert found.status == status
    assert shown["policy"] == (json.loads(body)["policy"] if status == 200 else "hedge")


def make_pair(folder: Path) -> dict[str, Any]:
    """Return the options of a certificate of this machine."""
    key, cert = folder / "key.pem", folder / "cert.pem"
    words = "openssl req -x509 -newkey rsa:2048 -nodes -days 2 -subj /CN=localhost"
    names = ["-addext", "subjectAltName=DNS:localhost,IP:127.0.0.1"]
    files = ["-keyout", str(key), "-out", str(cert)]
    subprocess.run([*words.split(), *names, *files], check=True, capture_output=True)
    return {"tls_cert": cert, "tls_key": key}


@pytest.fixture
def certificate(tmp_path: Path) -> dict[str, Any]:
    return make_pair(tmp_path)


async def test_tls_on_both_sides(certificate: dict[str, Any]) -> None:
    context = ssl.create_default_context(cafile=str(certificate["tls_cert"]))
    async with gateway(Upstream(), **certificate) as back:
        inner = parse_origin(back.gateway.url)
        ca = {"upstream_ca": certificate["tls_cert"]}
        urls = (f"https://127.0.0.1:{inner.port}", f"https://127.0.0.1:{inner.port}/#localhost")
        async with gateway(upstream=urls, **ca, **certificate) as front:
            client = HttpClient(parse_origin(front.gateway.url), context)
            for _ in range(10):
                found = await client.ask("POST", V2, 5.0, INFER)
                assert found.body == INFER
            client.close()
        async with gateway(upstream=urls, deadline_ms=500.0) as strict:  # it trusts nobody's CA
            assert (await strict.ask("POST", V2, INFER)).status == 503
    assert len(back.upstreams[0].requests) == 10


async def test_a_stopping_gateway_answers_what_it_has() -> None:
    slow = saying(None, after=0.5)
    async with Upstream(slow) as upstream, process(upstream) as one:
        asked = [asyncio.create_task(one.client.ask("POST", V2, 5.0, INFER)) for _ in range(3)]
        await until(lambda: len(upstream.requests) == 3)
        one.process.terminate()
        found = await asyncio.gather(*asked)
        events = await one.end()

    assert [each.body for each in found] == [INFER] * 3
    assert {each.field("connection") for each in found} == {"close"}
    assert b"Traceback" not in events


async def test_a_balancer_has_time_to_notice_that_it_stops() -> None:
    """First it says so, then it takes no more connections, and its own port closes last."""
    finished = asyncio.Event()

    async def handle(request: Request, writer: asyncio.StreamWriter) -> bytes:
        if request.path == "/long":
            await finished.wait()
        return answer(request.body)

    words = ("--drain-notice-ms", "1000", "--admin-port", "0")
    async with Upstream(handle) as upstream, process(upstream, *words) as one:
        long = asyncio.create_task(one.client.ask("GET", "/long", 20.0))
        await until(lambda: len(upstream.requests) == 1)
        assert (await one.admin.ask("GET", "/readyz", 5.0)).status == 200
        one.process.terminate()

        async def is_refused(client: HttpClient, path: str) -> bool:
            try:
                found = await client.ask("GET", path, 5.0)
            except OSError:
                return True
            return found.status == 503 and b"draining" in found.body

        while not await is_refused(one.admin, "/readyz"):
            await asyncio.sleep(0.01)
        while (found := await one.client.ask("GET", "/", 5.0)).field("connection") != "close":
            assert found.status == 200
        asked = 0
        while not await is_refused(one.client, "/"):
            asked += 1
        assert asked  # new connections, each with one answer
        assert await is_refused(one.admin, "/readyz")
        assert (await one.admin.ask("GET", "/livez", 5.0)).status == 200
        finished.set()
        assert (await long).status == 200
        await one.end()


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGUSR1])
async def test_other_signals_end_nothing(number: signal.Signals, tmp_path: Path) -> None:
    """A new token is needed soon, whether or not SIGHUP asks for it."""
    token = tmp_path / "token"
    token.write_text("old")
    async with Upstream() as upstream, process(upstream, "--token-file", str(token)) as one:

        async def status(token: str) -> int:
            bearer = [("authorization", f"Bearer {token}")]
            return (await one.client.ask("GET", "/", 5.0, headers=bearer)).status

        assert await status("old") == 200
        token.write_text("new")
        one.process.send_signal(number)
        for _ in range(100):
            await asyncio.sleep(0.1)
            if await status("new") == 200:
                break
        assert (await status("old"), await status("new")) == (401, 200)
        one.process.terminate()
        events = await one.end()
    assert (b'"reloaded"' in events) is (number is signal.SIGHUP)


async def test_the_access_log_and_the_level_of_the_log() -> None:
    async def ask(kind: str) -> list[str]:
        words = ("--access-log", kind, "--log-level", "error", "--deadline-ms", "500")
        async with Upstream() as upstream, process(upstream, *words) as one:
            fields = [("x-request-id", "r1"), ("user-agent", 'a"b')]
            await one.client.ask("POST", "/x?y=1", 5.0, b"12345", fields)
            await one.client.ask("GET", "/livez", 5.0)
            await upstream.stop()
            await one.client.ask("GET", "/y", 5.0)
            one.process.terminate()
            assert one.process.stdout is not None
            lines = (await one.process.stdout.read()).decode().splitlines()
            assert b'"info"' not in await one.end()
        return lines

    first, own, failed = (json.loads(line) for line in await ask("json"))
    assert (first["method"], first["path"], first["status"]) == ("POST", "/x?y=1", 200)
    assert (first["client"], first["bytes"], first["request_id"]) == ("127.0.0.1", 5, "r1")
    assert (first["outcome"], first["attempts"], first["route"]) == ("direct", 1, "other")
    assert first["upstream"].startswith("http://127.0.0.1:")
    assert (own["path"], own["status"], own["client"]) == ("/livez", 200, "127.0.0.1")
    assert failed["status"] >= 500
    line, *others = await ask("combined")
    pattern = r'127\.0\.0\.1 - - \[.+ \+0000\] "POST /x\?y=1 HTTP/1\.1" 200 5 "-" "a\\x22b"'
    assert re.fullmatch(pattern, line)
    assert len(others) == 2
