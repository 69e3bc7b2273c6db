from __future__ import annotations

import asyncio
import logging
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import uvloop

from codedinvnet.common.errors import UserError
from codedinvnet.net.admin_client import read_token
from codedinvnet.net.listening import bind
from codedinvnet.net.tracing import NOISY
from codedinvnet.serving import app as serving
from codedinvnet.serving.app import open_app
from codedinvnet.serving.config import ServeOptions
from codedinvnet.serving.opened import check
from tests.conftest import Command
from tests.processes import interruptible, wait_until
from tests.serving.options import changed


def test_connections_do_not_wait_for_acknowledgements() -> None:
    """With Nagle's algorithm on, every answer's body waits 40 ms for the client's one."""
    seen: list[int] = []

    async def accept(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        accepted = writer.get_extra_info("socket")
        seen.append(accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY))
        seen.append(accepted.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE))
        writer.close()

    async def run() -> None:
        listener = bind("127.0.0.1", 0)
        async with await asyncio.start_server(accept, sock=listener):
            reader, writer = await asyncio.open_connection(*listener.getsockname())
            assert await reader.read() == b""
            writer.close()

    uvloop.run(run())  # as the service does
    assert len(seen) == 2
    assert all(seen)


def test_a_taken_port_is_refused() -> None:
    with bind("127.0.0.1", 0) as first:
        port = first.getsockname()[1]
        with pytest.raises(UserError, match=f"cannot listen on 127.0.0.1:{port}"):
            bind("127.0.0.1", port)
    with pytest.raises(UserError, match=r"cannot listen on a\.\.b:0"):
        bind("a..b", 0)


@pytest.mark.parametrize("text", ["", " \n", "one\ntwo\n", "schlüssel"])
def test_what_is_no_token(text: str, tmp_path: Path) -> None:
    path = tmp_path / "token"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(UserError, match="holds no token"):
        read_token(path)
    path.write_text("secret\n", encoding="utf-8")
    assert (read_token(path), read_token(None)) == ("secret", "")


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (
            ServeOptions(source="mnist", ray_address="auto"),
            "--set ray-address: goes with --pool ray",
        ),
        (ServeOptions(source="mnist", inputs=("x:FP32:3",)), "--input: is for a model of your own"),
        (
            ServeOptions(source="file.py:make", name="team/resnet"),
            "--set name: must not have a slash",
        ),
    ],
)
def test_options_that_would_do_nothing(options: ServeOptions, told: str) -> None:
    with pytest.raises(UserError, match=told):
        check(options)


def test_groups_are_coded_before_the_deadline_where_there_are_any() -> None:
    own = ServeOptions(source="model.onnx", deadline_ms=20)
    check(own)
    for coded in (changed(own, source="mnist"), changed(own, method="approxifer")):
        with pytest.raises(
            UserError, match=r"^--set group-timeout-ms: must be below .* 20 ms, got 20"
        ):
            check(coded)


def test_a_batch_that_could_never_be_taken() -> None:
    """Of two workers 2,000 queries may wait; the client would try again for ever."""
    options = ServeOptions(source="mnist", k=2, workers=3, max_batch=2001)
    check(options)
    with pytest.raises(
        UserError, match="--set max-batch: a request of 2001 queries could never be"
    ):
        open_app(options)
    open_app(changed(options, max_batch=2000))
    with pytest.raises(UserError, match="with max-pending 100"):
        open_app(changed(options, max_batch=200, max_pending=100))


@pytest.mark.parametrize(("given", "told"), [(1999.0, False), (2000.0, True)])
def test_a_hung_query_that_has_no_time_to_be_sent_again_is_told(
    given: float, told: bool, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING, "codedinvnet.serving")
    check(ServeOptions(source="mnist", k=2, deadline_ms=2000, hang_timeout_ms=given))
    assert ("queries on hung workers are not sent again" in caplog.messages) == told


def test_a_command_that_is_refused_leaves_no_handler(call: Command) -> None:
    """What is logged later in this process would go to a stream that is closed by then."""
    loggers = [logging.getLogger(name) for name in ("codedinvnet.serving", "asyncio", *NOISY)]
    before = [(list(log.handlers), log.level, log.propagate) for log in loggers]
    assert call("serve", "nothing").code == 2
    assert call("gateway", "--upstream", "nothing", "--port", "0").code == 2
    assert [(log.handlers, log.level, log.propagate) for log in loggers] == before


@pytest.mark.parametrize(
    ("host", "token", "told"),
    [("127.0.0.1", False, False), ("0.0.0.0", False, True), ("0.0.0.0", True, False)],
)
def test_a_service_that_lets_everybody_in_says_so(
    host: str, token: bool, told: bool, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING, "codedinvnet.serving")
    options = ServeOptions(source="mnist", host=host, token_file=Path("x") if token else None)
    serving.warn_open(options)
    assert ("no token" in caplog.messages) == told


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_stop_while_the_model_is_loaded(number: signal.Signals, tmp_path: Path) -> None:
    path, begun = tmp_path / "slow.py", tmp_path / "begun"
    path.write_text(
        "import pathlib, time\n"
        f"def make():\n    pathlib.Path({str(begun)!r}).touch()\n    time.sleep(300)\n"
    )
    with (tmp_path / "log").open("w") as log, interruptible():
        command = [sys.executable, "-m", "codedinvnet", "serve", f"{path}:make", "--port", "0"]
        process = subprocess.Popen(command, stdout=log, stderr=log)
    try:
        assert wait_until(begun.exists, 60)
        process.send_signal(number)
        assert process.wait(30) == 0
    finally:
        process.kill()
        process.wait()
    assert (tmp_path / "log").read_text() == ""
