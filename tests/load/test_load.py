"""The load generator before servers of this process: what it sends, and what it tells."""

from __future__ import annotations

import asyncio
import itertools
import json
import math
import shutil
import socket
import ssl
import struct
import time
from collections.abc import Mapping
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
from aiohttp import web
from tritonclient.grpc import service_pb2 as pb

from codedinvnet.errors import UserError
from codedinvnet.evaluation.quantiles import Histogram
from codedinvnet.load.loop import AHEAD, open_loop
from codedinvnet.load.options import LoadOptions, check, server_and_model
from codedinvnet.load.run import FIRST, OTHER_FILES, Sender, measure, open_at_most
from codedinvnet.rows import read_rows
from codedinvnet.serving.gateway.calls import Headers, Reply, Unreachable
from tests.conftest import Command
from tests.serving.gateway.fakes import Fake, GrpcFake, gateway
from tests.serving.gateway.test_tls import make_pair
from tests.virtual import VirtualLoop

FAST: dict[str, Any] = {"rate": 200.0, "duration": 0.5, "arrivals": "constant"}


def load(fake: Fake | GrpcFake, **options: Any) -> dict[str, Any]:
    async def run() -> dict[str, Any]:
        await fake.start()
        try:
            return await measure(LoadOptions(fake.url, model="m", **{**FAST, **options}))
        finally:
            await fake.stop()

    return asyncio.run(run())


def sent(body: bytes, headers: dict[str, str]) -> tuple[dict[str, Any], bytes]:
    length = int(headers["inference-header-content-length"])
    return json.loads(body[:length]), body[length:]


def test_a_load_over_http() -> None:
    fake = Fake()
    fake.delay = 0.03
    row = load(fake, batch=2, header=("Authorization: Bearer x",))
    assert (row["requests"], row["answered"], row["unsent"], row["errors"]) == (100, 100, 0, {})
    assert row["offered_per_s"] == pytest.approx(200)
    assert 30 <= row["p50_ms"] <= row["p99_ms"] <= row["max_ms"]
    assert len(fake.seen) == 110  # some come first, and do not count
    bodies = set()
    for _, headers, body in fake.seen:
        head, tail = sent(body, headers)
        (tensor,) = head["inputs"]
        assert (tensor["name"], tensor["datatype"], tensor["shape"]) == ("x", "FP32", [2, 3])
        values = np.frombuffer(tail, np.float32)
        assert len(values) == 6
        assert ((values >= 0) & (values < 1)).all()
        assert headers["authorization"] == "Bearer x"
        bodies.add(body)
    assert len(bodies) == 64


def test_a_load_over_grpc() -> None:
    fake = GrpcFake()
    row = load(fake)
    assert (row["answered"], row["settings"]["tensors"]) == (100, "binary")
    message = pb.ModelInferRequest.FromString(fake.seen[-1][0])
    assert (message.model_name, message.inputs[0].name) == ("m", "x")
    assert len(message.raw_input_contents[0]) == 12


def test_a_server_that_takes_json_alone_gets_it() -> None:
    class Plain(Fake):
        async def _infer(self, request: web.Request) -> web.Response:
            if "Inference-Header-Content-Length" in request.headers:
                return web.Response(status=422, text="not JSON")
            return await super()._infer(request)

    fake = Plain()
    assert load(fake)["settings"]["tensors"] == "JSON"
    tensor = json.loads(fake.seen[-1][2])["inputs"][0]
    assert (tensor["shape"], len(tensor["data"])) == ([1, 3], 3)


def test_a_server_that_fails_now_and_then_gets_binary_tensors_all_the_same() -> None:
    class Flaky(Fake):
        async def _infer(self, request: web.Request) -> web.Response:
            self.status = 503 if len(self.seen) in (0, 5) else 200
            return await super()._infer(request)

    row = load(Flaky())
    assert (row["answered"], row["settings"]["tensors"]) == (100, "binary")


def test_a_server_that_says_nothing_is_asked_once() -> None:
    """Whether it takes binary tensors is not the question then, and each try takes a timeout."""
    fake = Fake()
    fake.hold()
    with pytest.raises(UserError, match="the first requests failed"):
        load(fake, timeout=0.2)
    assert len(fake.seen) == 1


@pytest.mark.skipif(not shutil.which("openssl"), reason="openssl is not installed")
async def test_a_server_that_stands_still_while_one_connects_is_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For as long as for an answer: over TLS it takes the server to make a connection."""
    chain, key = make_pair(tmp_path / "pair")
    monkeypatch.setenv("SSL_CERT_FILE", str(chain))
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(chain, key)
    fake, listening = Fake(), socket.create_server(("127.0.0.1", 0))
    await fake.start()
    url = f"https://127.0.0.1:{listening.getsockname()[1]}"
    load = asyncio.create_task(measure(LoadOptions(url, model="m", **FAST)))
    await asyncio.sleep(1.2)  # longer than a gateway waits for a connection
    assert fake._runner is not None
    await web.SockSite(fake._runner, listening, ssl_context=context).start()
    assert (await load)["answered"] == 100
    await fake.stop()


def test_no_more_requests_are_open_than_there_may_be_files() -> None:
    class Limits(SimpleNamespace):
        RLIM_INFINITY, RLIMIT_NOFILE = -1, 7
        hard = 256

        def getrlimit(self, _: int) -> tuple[int, int]:
            return 100, self.hard

        def setrlimit(self, kind: int, limits: tuple[int, int]) -> None:
            self.raised = (kind, limits)

    limits = Limits()
    with patch("codedinvnet.load.run.resource", limits):
        assert open_at_most(LoadOptions("http://a", max_open=10_000)) == 256 - OTHER_FILES
        assert limits.raised == (7, (256, 256))
        assert open_at_most(LoadOptions("http://a", max_open=100)) == 100
        assert limits.raised == (7, (100 + OTHER_FILES, 256))
        limits.hard = -1
        assert open_at_most(LoadOptions("http://a", max_open=10_000)) == 10_000
        assert limits.raised == (7, (10_000 + OTHER_FILES, -1))
        del limits.raised
        assert open_at_most(LoadOptions("grpc://a", max_open=10_000)) == 10_000
        assert not hasattr(limits, "raised")


@dataclass
class Still:
    """A server in virtual time: it answers after 32 ms, and once stands still for half a second."""

    number: int = -1
    """The request of the load at which it does; below 0: it never does."""
    with_client: bool = False
    """Whether its client stands still as well."""
    headers: Headers = ()
    tries: int = 1
    seen: int = 0
    until: float = 0.0

    async def metadata(self, *_: Any) -> Mapping[str, Any]:
        found: Mapping[str, Any] = Fake().metadata
        return found

    async def infer(self, *_: Any) -> Reply:
        loop = asyncio.get_running_loop()
        if self.seen == FIRST + self.number:
            self.until = loop.time() + 0.5
            if self.with_client:
                assert isinstance(loop, VirtualLoop)
                loop.leap.now = self.until
        self.seen += 1
        await asyncio.sleep(max(0.032, self.until - loop.time()))
        return Reply("http", 200)

    async def close(self) -> None: ...


def exactly(server: Still, **options: Any) -> dict[str, Any]:
    loop = VirtualLoop()
    clock = SimpleNamespace(perf_counter=loop.time, strftime=time.strftime)
    with (
        patch("codedinvnet.load.loop.time", clock),
        patch("codedinvnet.load.run.time", clock),
        patch("codedinvnet.load.run.open_upstream", lambda *_, **__: server),
        closing(loop),
    ):
        return loop.run_until_complete(
            measure(LoadOptions("http://a/v2/models/m", **{**FAST, **options}))
        )


def slower_than(ms: float, row: dict[str, Any]) -> int:
    found = Histogram.of_row(row)
    latency, later = found.curve()
    return int(later[latency <= ms][-1]) if (latency <= ms).any() else found.total


def test_times_are_exact() -> None:
    row = exactly(Still())
    assert (row["answered"], row["unsent"], row["errors"]) == (100, 0, {})
    assert (row["p50_ms"], row["max_ms"]) == pytest.approx((32, 32), rel=1e-3)
    assert row["seconds"] == pytest.approx(AHEAD + 0.5 + 0.032, abs=1e-3)
    assert row["answered_per_s"] == pytest.approx(100 / 0.582, rel=1e-3)
    assert row["sent_late_p99_ms"] < 0.01


def test_the_rate_is_of_the_time_in_which_answers_came() -> None:
    class Silent(Still):
        async def infer(self, *_: Any) -> Reply:
            if self.seen == FIRST + 20:
                self.seen += 1
                await asyncio.sleep(60)
                raise Unreachable("no answer")
            return await super().infer()

    row = exactly(Silent())
    assert (row["answered"], row["errors"]) == (99, {"no answer": 1})
    assert row["seconds"] > 60
    assert row["answered_per_s"] == pytest.approx(99 / 0.582, rel=1e-3)
    assert (row["p50_ms"], row["p99_ms"]) == pytest.approx((32, 32), rel=1e-3)
    assert (row["p999_ms"], row["max_ms"], Histogram.of_row(row).lost) == (None, None, 1)


def test_servers_are_asked_in_turn_and_answers_are_checked() -> None:
    asked: list[tuple[int, int]] = []

    @dataclass
    class Server:
        number: int

        async def infer(self, call: int, timeout: float) -> Reply:
            asked.append((self.number, call))
            return Reply("http", 200)

    servers: list[Any] = [Server(0), Server(1)]
    calls: list[Any] = [0, 1, 2]
    sender = Sender(servers, calls, 1.0, lambda number, _: number != 3)

    async def send() -> None:
        for number in range(6):
            await sender.send(number, time.perf_counter())

    asyncio.run(send())
    assert asked == [(0, 0), (1, 1), (0, 2), (1, 0), (0, 1), (1, 2)]
    assert (sender.ends.wrong, sender.ends.answered) == (1, 5)
    assert [number for number, ms in enumerate(sender.ends.latency) if math.isinf(ms)] == [3]


def test_who_stands_still_makes_those_late_that_wait() -> None:
    """A client that waited for answers would have sent one request into the pause."""
    row = exactly(Still(20), duration=1.0)
    assert slower_than(252, row) == 50  # those due in its first half, one in 5 ms
    assert row["max_ms"] == pytest.approx(500, rel=1e-3)
    assert row["p50_ms"] == pytest.approx(32, rel=1e-3)


def test_latency_counts_from_when_a_request_was_due() -> None:
    row = exactly(Still(20, with_client=True), duration=1.0)
    # Those due in 282 ms, though they were sent late, and those that were under way.
    assert slower_than(250, row) == 57 + 6
    assert row["max_ms"] == pytest.approx(532, rel=1e-3)
    assert row["sent_late_p99_ms"] > 480


def test_what_is_due_while_too_many_are_open_is_not_sent() -> None:
    row = exactly(Still(), max_open=2)
    assert (row["answered"], row["unsent"]) == (30, 70)
    assert Histogram.of_row(row).lost == 70  # they are infinitely late
    assert [row[name] for name in ("p50_ms", "p999_ms", "mean_ms", "max_ms")] == [None] * 4


async def test_a_percentile_among_requests_without_an_answer_is_printed_as_never(
    call: Command,
) -> None:
    numbers = itertools.count()

    class Shedding(Fake):
        async def _infer(self, request: web.Request) -> web.Response:
            fails = next(numbers) >= FIRST + 40
            return web.Response(status=503) if fails else await super()._infer(request)

    fake = Shedding()
    await fake.start()
    words = ["load", f"{fake.url}/v2/models/m", "--rate", "200", "--duration", "0.25"]
    outcome = await asyncio.to_thread(call, *words, "--arrivals", "constant")
    await fake.stop()
    told = dict(line.split(maxsplit=1) for line in outcome.out.splitlines())
    assert (told["answered"], told["errors"]) == ("40", '{"http 503": 10}')
    assert float(told["p50_ms"]) < 1000
    assert (told["p90_ms"], told["max_ms"]) == ("never", "never")


def test_errors_do_not_count_as_answers() -> None:
    numbers = itertools.count()

    class Sometimes(Fake):
        async def _infer(self, request: web.Request) -> web.Response:
            number = next(numbers)
            reply = await super()._infer(request)
            if number == 30 and request.transport is not None:
                request.transport.close()
            fails = number >= 10 and number % 2
            return web.Response(status=503, body=self.body) if fails else reply

    row = load(Sometimes())
    assert row["answered"] + sum(row["errors"].values()) == 100
    assert row["errors"]["http 503"] >= 45
    assert row["errors"]["no answer"] == 1
    assert row["first_error"]


def test_the_outcomes_of_a_gateway() -> None:
    async def run() -> dict[str, Any]:
        async with gateway(Fake()) as (address, _, _):
            return await measure(LoadOptions(f"{address}/v2/models/m", **{**FAST, "rate": 40.0}))

    row = asyncio.run(run())
    assert row["outcomes"] == {"direct": 20}


async def test_rows_are_kept_and_their_histograms_added(tmp_path: Path, call: Command) -> None:
    out = tmp_path / "rows.jsonl"

    for delay in (0.0, 0.05):
        fake = Fake()
        fake.delay = delay
        await fake.start()
        words = ["load", f"{fake.url}/v2/models/m", "--rate", "100", "--duration", "0.5"]
        words += ["--arrivals", "constant", "--out", str(out), "--json"]
        outcome = await asyncio.to_thread(call, *words)
        assert outcome.code == 0, outcome.err
        assert json.loads(outcome.out)["answered"] == 50
        await fake.stop()
    rows = read_rows(out)
    assert rows[1]["p50_ms"] >= 50
    both = Histogram.of_row(rows[0]) + Histogram.of_row(rows[1])
    assert (both.total, both.lost) == (100, 0)
    assert both.percentile(1.0) == pytest.approx(max(row["max_ms"] for row in rows), rel=0.01)


async def test_a_file_that_takes_no_row_is_refused_before_the_load(
    tmp_path: Path, call: Command
) -> None:
    notes = tmp_path / "notes.txt"
    notes.write_text("my notes\n")
    fake = Fake()
    await fake.start()
    for out in (notes, tmp_path, notes / "rows.jsonl"):
        words = ["load", f"{fake.url}/v2/models/m", "--duration", "0.1", "--out", str(out)]
        outcome = await asyncio.to_thread(call, *words)
        assert outcome.code == 2
        (line,) = outcome.err.splitlines()
        assert str(out) in line
    await fake.stop()
    assert fake.seen == []
    assert notes.read_text() == "my notes\n"


async def test_a_row_that_cannot_be_kept_is_printed(tmp_path: Path, call: Command) -> None:
    fake, out = Fake(), tmp_path / "rows.jsonl"
    await fake.start()
    words = ["load", f"{fake.url}/v2/models/m", "--rate", "100", "--duration", "0.1"]
    words += ["--arrivals", "constant", "--out", str(out), "--json"]
    with patch("codedinvnet.load.run.append_row", side_effect=OSError(28, "No space left")):
        outcome = await asyncio.to_thread(call, *words)
    await fake.stop()
    assert outcome.code != 0
    assert json.loads(outcome.out)["answered"] > 0


def test_inputs_from_a_file(tmp_path: Path) -> None:
    queries = np.arange(30, dtype=np.float32).reshape(10, 3)
    np.savez(tmp_path / "x.npz", x=queries)
    fake = Fake()
    load(fake, inputs=tmp_path / "x.npz", batch=5)
    found = [np.frombuffer(sent(body, headers)[1], np.float32) for _, headers, body in fake.seen]
    assert {tuple(values) for values in np.concatenate(found).reshape(-1, 3)} == {
        tuple(query) for query in queries
    }
    with pytest.raises(UserError, match="--batch 20"):
        load(Fake(), inputs=tmp_path / "x.npz", batch=20)


def test_inputs_of_every_kind() -> None:
    fake = Fake()
    inputs = [
        {"name": "tokens", "datatype": "INT32", "shape": [-1, -1]},
        {"name": "word", "datatype": "BYTES", "shape": [-1, 1]},
        {"name": "mask", "datatype": "BOOL", "shape": ["-1", "4"]},
    ]
    fake.metadata = {**fake.metadata, "inputs": inputs}
    with pytest.raises(UserError, match="--input tokens:INT32:N"):
        load(fake)
    load(fake, shapes=("tokens:INT32:7",))
    head, tail = sent(fake.seen[-1][2], fake.seen[-1][1])
    assert [tensor["shape"] for tensor in head["inputs"]] == [[1, 7], [1, 1], [1, 4]]
    assert (np.frombuffer(tail[:28], np.int32) < 10).all()
    assert struct.unpack("<I", tail[28:32]) == (8,)
    assert set(tail[40:]) <= {0, 1}
    for told in ("tokens:INT64:7", "tokens:INT32:7x7", "other:INT32:7"):
        with pytest.raises(UserError, match="--input"):
            load(fake, shapes=(told,))


def test_the_rate_of_a_log_is_that_of_its_gaps(tmp_path: Path) -> None:
    """Requests that come all at once have none."""
    log = tmp_path / "log"
    for text, count, rate in (("5\n" * 3, 3, None), ("5\n5.1\n5.2\n", 3, 10.0)):
        log.write_text(text)
        row = load(Fake(), arrivals=str(log), rate=None)
        assert (row["answered"], row["offered_per_s"]) == (count, rate)


def test_which_server_and_which_model() -> None:
    assert server_and_model(LoadOptions("http://a:1/p/v2/models/a%20b")) == ("http://a:1/p", "a b")
    assert server_and_model(LoadOptions("grpc://a:1", model="m")) == ("grpc://a:1", "m")


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["http://127.0.0.1:1"], "URL: which model?"),
        (
            ["http://127.0.0.1:1/v2/models/m/versions/2"],
            "URL: 'http://127.0.0.1:1/v2/models/m/versions/2': say a version by --model-version",
        ),
        (["http://127.0.0.1:1/v2/models/m", "--model", "n"], "--model: 'n'"),
        (["http://127.0.0.1:1/v2/models/m"], "http://127.0.0.1:1/v2/models/m: Connection refused"),
        (["ftp://127.0.0.1:1/v2/models/m"], "URL: 'ftp://127.0.0.1:1'"),
        (["http://[::1/v2/models/m"], "URL: 'http://[::1/v2/models/m' is none: "),
        (["http://127.0.0.1:1/v2/models/m", "--rate", "0"], "--rate: must be above 0"),
        (["http://127.0.0.1:1/v2/models/m", "--rate", "nan"], "--rate: must be above 0"),
        (["http://127.0.0.1:1/v2/models/m", "--duration", "-1"], "--duration: must be above 0"),
        (["http://127.0.0.1:1/v2/models/m", "--header", "none"], "--header: 'none'"),
        (
            ["http://127.0.0.1:1/v2/models/m", "--arrivals", "nowhere"],
            "--arrivals: cannot read nowhere: ",
        ),
        ([], "URL: is needed"),
    ],
)
def test_mistakes_are_one_line(words: list[str], told: str, call: Command) -> None:
    outcome = call("load", *words)
    assert outcome.code == 2
    (line,) = outcome.err.splitlines()
    assert line.startswith(f"error: {told}")
    assert "--upstream" not in line


def test_a_server_that_answers_nothing_but_errors() -> None:
    fake = Fake()
    fake.status, fake.body = 400, b'{"error": "no such input"}'
    with pytest.raises(UserError, match="no such input"):
        load(fake)
    fake = Fake()
    fake.metadata = None
    with pytest.raises(UserError, match="no model 'm'"):
        load(fake)
    check(LoadOptions("http://a/v2/models/m"))


def test_what_a_call_raises_is_raised_when_all_are_over() -> None:
    over = []

    async def call(number: int, _: float) -> None:
        await asyncio.sleep(0.01 * number)
        if number == 1:
            raise ValueError("of the second")
        over.append(number)

    with pytest.raises(ValueError, match="of the second"):
        asyncio.run(open_loop(call, [0.0] * 5, "some"))
    assert sorted(over) == [0, 2, 3, 4]
