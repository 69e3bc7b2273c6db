"""`python -m benchmarks proxy`: what proxies do where no request may be sent twice, and at stops.

Three replicas that answer after 10 ms, of which some fail, stand still or refuse. Half of the mixed
traffic is on a route that every proxy was told to be safe, half on one that nobody named.
"""

from __future__ import annotations

import asyncio
import math
import os
import signal
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

from pandas import DataFrame

from benchmarks.peers.contenders import CHAT, CONTENDERS, UNNAMED, Contender, Site
from benchmarks.processes import running
from codedinvnet.common.errors import UserError
from codedinvnet.net.client import HttpClient, parse_origin
from codedinvnet.net.listening import free_port

REPLICAS, SLOTS, SERVICE = 3, 8, 0.01
REQUESTS, RATE = 600, 100.0
"""Requests of a situation that counts errors, and how many a second."""
PATIENCE = 20.0
"""Seconds after which a client gives up: later than any proxy."""
SLOW = 0.3
"""Seconds that an answer of a slow replica takes."""
COLD, WARMING, DOWN = 1.0, 5.0, 2.0
"""Seconds that an answer of a replica takes which has just been started, for how many seconds, and
for how many it is gone before."""
LATE = 0.1
"""Seconds after which an answer is late, of replicas that take a tenth of that."""
IDLE = 2.0
"""Seconds without a byte after which a stream is to end, where the proxy can be told."""
FAULTS = ("slow", "hung", "killed", "500", "503", "429", "garbage")
OK = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 2\r\n\r\n{}"
EVENTS = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
EVENT = b'data: {"choices":[{"delta":{"content":"x"}}]}\n\n'
CHUNK = b"%x\r\n%b\r\n" % (len(EVENT), EVENT)

Behaviour: TypeAlias = Callable[[asyncio.StreamWriter], Awaitable[None]]


async def answers(writer: asyncio.StreamWriter, seconds: float = SERVICE) -> None:
    """Answer after a while."""
    await asyncio.sleep(seconds)
    writer.write(OK)


async def fails(writer: asyncio.StreamWriter, status: int, fields: str = "") -> None:
    """Answer with an error at once."""
    writer.write(f"HTTP/1.1 {status} X\r\n{fields}Content-Length: 0\r\n\r\n".encode())


async def talks_nonsense(writer: asyncio.StreamWriter) -> None:
    """Answer what is no HTTP."""
    writer.write(b"no HTTP\r\n\r\n")
    writer.close()


async def streams(writer: asyncio.StreamWriter, events: int, seconds: float, ends: bool) -> None:
    """Answer with events that come evenly, and then end, or stand still."""
    writer.write(EVENTS)
    for _ in range(events):
        writer.write(CHUNK)
        await asyncio.sleep(seconds / events)
    if not ends:
        await asyncio.sleep(PATIENCE)
    writer.write(b"0\r\n\r\n")


FAULTY: dict[str, Behaviour] = {
    "slow": partial(answers, seconds=SLOW),
    "hung": partial(answers, seconds=4 * PATIENCE),
    "garbage": talks_nonsense,
    "429": partial(fails, status=429, fields="Retry-After: 3\r\n"),
    **{status: partial(fails, status=int(status)) for status in ("500", "503")},
}


@dataclass
class Replica:
    """A server.

    Attributes:
        behave: answers whatever is no probe.
        requests: that came.
        left: seconds from which on a client's connection was gone, of each answer it didn't await.
    """

    behave: Behaviour = answers
    requests: int = 0
    left: list[float] = field(default_factory=list)
    port: int = 0

    async def start(self) -> None:
        """Listen."""
        self._writers: set[asyncio.StreamWriter] = set()
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", self.port)
        self.port = self._server.sockets[0].getsockname()[1]

    def stop(self) -> None:
        """Close the port and all connections, as a killed process does."""
        self._server.close()
        for writer in self._writers:
            writer.transport.abort()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._writers.add(writer)
        try:
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).lower()
                _, _, length = head.partition(b"content-length:")
                await reader.readexactly(int(length.split(b"\r\n")[0] or 0))
                if head.startswith((b"get", b"options")):
                    writer.write(OK)
                    continue
                self.requests += 1
                await self._answer(reader, writer)
        except (OSError, asyncio.IncompleteReadError, asyncio.CancelledError):
            pass  # a cancelled one would be reported by asyncio as a mistake
        finally:
            self._writers.discard(writer)
            writer.close()

    async def _answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        answering = asyncio.ensure_future(self.behave(writer))
        leaving = asyncio.ensure_future(reader.read(1))  # no proxy here pipelines
        try:
            await asyncio.wait((answering, leaving), return_when=asyncio.FIRST_COMPLETED)
            if not answering.done():
                self.left.append(time.monotonic())
                raise ConnectionResetError
            await answering
        finally:
            for each in (answering, leaving):
                each.cancel()
            await asyncio.gather(answering, leaving, return_exceptions=True)


@dataclass
class Trial:
    """A proxy in front of replicas."""

    url: str
    pid: int
    folder: Path
    replicas: list[Replica]
    stop_signal: signal.Signals

    async def ask(self, path: str, token: str = "") -> int:
        """Return the status of an answer; 0 without one."""
        client = HttpClient(parse_origin(self.url))
        fields = [("authorization", f"Bearer {token}")] if token else []
        try:
            return (await client.ask("POST", path, PATIENCE, b"{}", fields)).status
        except OSError:
            return 0
        finally:
            client.close()

    async def errors(self, paths: Sequence[str] = (UNNAMED,), killed: int = 0) -> float:
        """Return how many of all requests got no answer, or another than 200."""
        began, asking = time.monotonic(), []
        for number in range(REQUESTS):
            await asyncio.sleep(max(0.0, began + number / RATE - time.monotonic()))
            asking.append(asyncio.ensure_future(self.ask(paths[number % len(paths)])))
            if number == REQUESTS // 3:
                for replica in self.replicas[:killed]:
                    replica.stop()
        return sum(status != 200 for status in await asyncio.gather(*asking))

    async def seconds(self, path: str, count: int) -> list[float]:
        """Return how long each of some requests took; infinite of those without an answer."""

        async def one() -> float:
            began = time.monotonic()
            status = await self.ask(path)
            return time.monotonic() - began if status == 200 else math.inf

        began, asking = time.monotonic(), []
        for number in range(count):
            await asyncio.sleep(max(0.0, began + number / RATE - time.monotonic()))
            asking.append(asyncio.ensure_future(one()))
        return await asyncio.gather(*asking)

    async def open_stream(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """Ask for a stream, on a connection of its own."""
        host, port = self.url.removeprefix("http://").split(":")
        reader, writer = await asyncio.open_connection(host, int(port))
        head = f"POST {CHAT} HTTP/1.1\r\nHost: {host}\r\nContent-Length: 2\r\n\r\n{{}}"
        writer.write(head.encode())
        return reader, writer


async def _failing(trial: Trial, fault: str) -> float:
    trial.replicas[0].behave = FAULTY[fault]
    return await trial.errors()


async def _mixed(trial: Trial, fault: str, count: int) -> float:
    for replica in trial.replicas[:count]:
        replica.behave = FAULTY.get(fault, answers)
    return await trial.errors((UNNAMED, CHAT), count if fault == "killed" else 0)


async def _returns(trial: Trial, path: str) -> float:
    """Return how many requests were late after a restart, from when the replica was back."""
    replica, loop = trial.replicas[0], asyncio.get_running_loop()
    await trial.seconds(path, REQUESTS // 3)
    replica.stop()
    await trial.seconds(path, round(DOWN * RATE))
    replica.behave = partial(answers, seconds=COLD)
    await replica.start()
    loop.call_later(WARMING, setattr, replica, "behave", answers)
    return sum(each > LATE for each in await trial.seconds(path, REQUESTS))


async def _stalled(trial: Trial) -> float:
    for replica in trial.replicas:
        replica.behave = partial(streams, events=3, seconds=0.1, ends=False)
    reader, writer = await trial.open_stream()
    began = time.monotonic()
    async with asyncio.timeout(3 * PATIENCE):
        await _rest(reader)
    writer.close()
    return time.monotonic() - began


async def _leaves(trial: Trial) -> float:
    for replica in trial.replicas:
        replica.behave = FAULTY["hung"]
    _, writer = await trial.open_stream()
    await asyncio.sleep(0.5)
    writer.close()
    began = time.monotonic()
    while not any(replica.left for replica in trial.replicas):
        if time.monotonic() - began > PATIENCE:
            return PATIENCE
        await asyncio.sleep(0.01)
    return max(replica.left[0] for replica in trial.replicas if replica.left) - began


async def _stopped(trial: Trial) -> float:
    for replica in trial.replicas:
        replica.behave = partial(streams, events=16, seconds=8.0, ends=True)
    reader, writer = await trial.open_stream()
    await asyncio.sleep(1.0)
    os.kill(trial.pid, trial.stop_signal)
    found = await _rest(reader)
    writer.close()
    return 16 - found.count(b"data:")


async def _refused(trial: Trial) -> float:
    for replica in trial.replicas:
        replica.behave = FAULTY["429"]
    await asyncio.gather(*(trial.ask(CHAT) for _ in range(40)))
    return sum(replica.requests for replica in trial.replicas)


async def _cold(trial: Trial) -> float:
    for replica in trial.replicas:
        replica.behave = partial(answers, seconds=6.0)
    await trial.ask(CHAT)
    return sum(replica.requests for replica in trial.replicas)


async def _signalled(trial: Trial, number: signal.Signals) -> float:
    asking = [asyncio.ensure_future(trial.ask(UNNAMED)) for _ in range(20)]
    os.kill(trial.pid, number)
    await asyncio.sleep(0.5)
    asking += [asyncio.ensure_future(trial.ask(UNNAMED)) for _ in range(20)]
    return sum(status != 200 for status in await asyncio.gather(*asking))


async def _new_token(trial: Trial) -> float:
    began = time.monotonic()
    (trial.folder / "token").write_text("second-token-of-this-gateway\n", encoding="ascii")
    while await trial.ask(UNNAMED, "second-token-of-this-gateway") != 200:
        if time.monotonic() - began > PATIENCE:
            return PATIENCE
        await asyncio.sleep(0.05)
    took = time.monotonic() - began
    return took if await trial.ask(UNNAMED, TOKEN) == 401 else PATIENCE


async def _rest(reader: asyncio.StreamReader) -> bytes:
    """Return what comes until the end of a stream, or of its connection."""
    found = b""
    try:
        while not found.endswith(b"0\r\n\r\n") and (data := await reader.read(1 << 16)):
            found += data
    except OSError:
        pass
    return found


TOKEN = "first-token-of-this-gateway"


@dataclass(frozen=True)
class Situation:
    """What happens.

    Attributes:
        run: returns the figure.
        figure: what it is.
        wanted: the figure at most.
        options: of the gateway.
        only_ours: whether others have nothing like it.
    """

    run: Callable[[Trial], Awaitable[float]]
    figure: str
    wanted: float | None = None
    options: tuple[str, ...] = ()
    only_ours: bool = False


ERRORS = f"errors of {REQUESTS}"
LATE_ONES = f"late or failed of {REQUESTS}"
SITUATIONS: dict[str, Situation] = {
    "500 at once, unnamed": Situation(partial(_failing, fault="500"), ERRORS, 36),
    "429, Retry-After 3, unnamed": Situation(partial(_failing, fault="429"), ERRORS, 36),
    "a stream stalls": Situation(
        _stalled, "s until it ends", IDLE + 1, ("--route", f"POST {CHAT} idle={IDLE:g}s")
    ),
    "the client leaves": Situation(_leaves, "s until the replica knows", 0.2),
    "a stop in a stream": Situation(_stopped, "events lost of 16", 0, ("--deadline-ms", "3000")),
    "all answer 429": Situation(
        _refused, "requests upstream for 40", 44, ("--route", f"POST {CHAT} hedge=on")
    ),
    "a cold start with 6 s of computing": Situation(
        _cold, "requests upstream for 1", 1, ("--route", f"POST {CHAT} hedge=on")
    ),
    **{
        f"a replica returns cold, {name}": Situation(
            partial(_returns, path=path), LATE_ONES, wanted, ("--route", f"POST {CHAT} hedge=on")
        )
        for name, path, wanted in (("unnamed", UNNAMED, 6), ("named", CHAT, 1))
    },
    "SIGHUP": Situation(partial(_signalled, number=signal.SIGHUP), "errors of 40", 0),
    "SIGUSR1": Situation(
        partial(_signalled, number=signal.SIGUSR1), "errors of 40", 0, only_ours=True
    ),
    "a new token": Situation(
        _new_token, "s until it holds", 2.0, ("--token-file", "FOLDER/token"), only_ours=True
    ),
    **{
        f"{'one' if count == 1 else 'two'} of three: {fault}": Situation(
            partial(_mixed, fault=fault, count=count),
            ERRORS,
            options=("--route", f"POST {CHAT} hedge=on"),
        )
        for count in (1, 2)
        for fault in FAULTS
    },
}
"""What happens -> how it is measured."""


def ours(options: Sequence[str]) -> Contender:
    """Return the gateway with these options."""

    def words(site: Site) -> list[str]:
        urls = [f"--upstream=http://127.0.0.1:{port}" for port in site.upstreams]
        own = [option.replace("FOLDER", str(site.folder)) for option in options]
        return ["gateway", "--port", str(site.port), *urls, *own]

    return Contender(words)


@asynccontextmanager
async def _trial(peer: str, situation: Situation) -> AsyncIterator[Trial]:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "token").write_text(f"{TOKEN}\n", encoding="ascii")
        async with AsyncExitStack() as stack:
            replicas = [Replica() for _ in range(REPLICAS)]
            for replica in replicas:
                await replica.start()
                stack.callback(replica.stop)
            ports = [replica.port for replica in replicas]
            site = Site(folder, free_port(), ports, SLOTS)
            contender = ours(situation.options) if peer == "gateway" else PEERS[peer]
            process = running(*contender.command(site), ready="", log=folder / "log")
            found = await asyncio.to_thread(process.__enter__)
            stack.push_async_callback(asyncio.to_thread, process.__exit__, None, None, None)
            url = f"http://127.0.0.1:{site.port}"
            stop = signal.SIGUSR1 if contender.program == "haproxy" else signal.SIGTERM
            trial = Trial(url, found.pid, folder, replicas, stop)
            end = time.monotonic() + PATIENCE
            while await trial.ask(UNNAMED, TOKEN) != 200:
                if time.monotonic() > end:
                    raise UserError(f"{peer} did not start: {(folder / 'log').read_text()}")
                await asyncio.sleep(0.1)
            for replica in replicas:
                replica.requests = 0
            yield trial


PEERS: dict[str, Contender] = {
    "envoy": CONTENDERS["envoy-least-request"],
    "haproxy": CONTENDERS["haproxy-leastconn"],
    **CONTENDERS,
}


async def _measure(peer: str, situation: Situation) -> float:
    async with _trial(peer, situation) as trial:
        return round(await situation.run(trial), 2)


def run(peer: Sequence[str] | None = None, only: Sequence[str] = ()) -> dict[str, Any]:
    """Put each proxy into each situation.

    Args:
        peer: `gateway`, `haproxy`, `envoy`, or names of `peers`' contenders; None: the first two.
        only: the situations that have one of these words in them; empty: all.

    Raises:
        UserError: if a name is unknown, or a program is not installed.
    """
    peers = peer or ("gateway", "haproxy")
    if unknown := set(peers) - {"gateway", *PEERS}:
        raise UserError(f"--peer: unknown {sorted(unknown)}; known: gateway, {', '.join(PEERS)}")
    chosen = {
        name: each
        for name, each in SITUATIONS.items()
        if not only or any(word in name for word in only)
    }
    rows = []
    for name, situation in chosen.items():
        row: dict[str, Any] = {"situation": name, "figure": situation.figure}
        row["wanted"] = "" if situation.wanted is None else f"≤ {situation.wanted:g}"
        for each in peers:
            applies = each == "gateway" or not situation.only_ours
            row[each] = f"{asyncio.run(_measure(each, situation)):g}" if applies else ""
        print("; ".join(f"{key}: {value}" for key, value in row.items()), flush=True)
        rows.append(row)
    return {"rows": rows, "table": DataFrame(rows).to_string(index=False)}
