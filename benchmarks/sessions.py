"""`python -m benchmarks sessions`: chats in turns, before replicas that cache their prefixes.

A turn sends all that was said before, so a replica that has served the session computes only what
is new. Each contender gets the same sessions; replicas begin with empty caches.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import statistics
import tempfile
import time
from collections.abc import Awaitable, Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from pandas import DataFrame

from benchmarks.engines import Engine, command
from benchmarks.peers.contenders import CHAT as PATH
from benchmarks.peers.contenders import VLLM_ROUTER, Contender, Site
from benchmarks.processes import Running, running
from codedinvnet.common.errors import UserError
from codedinvnet.common.quantiles import percentile
from codedinvnet.evaluation import tables
from codedinvnet.net.client import HttpClient, parse_origin
from codedinvnet.net.listening import free_port

REPLICAS, SESSIONS, TURNS = 3, 30, 6
SYSTEM, SAID, ANSWERED = 2000, 4000, 400
"""Bytes of the instructions, which all share, of what a client says in a turn in the mean, and of
an answer."""
START, THINK = 0.4, 1.5
"""Mean seconds between two beginnings of sessions, and from an answer to the next turn."""
TIMEOUT = 60.0
FAULTS = ("none", "slow", "stalled", "restarted")
"""The first replica takes 20 times as long and a second; stands still for STANDS seconds; is killed
and started again after DOWN seconds."""
SLOW, PAUSE, STANDS, DOWN = 20.0, 1.0, 5.0, 2.0
FORMATS = {"prefill s": ".1f", "p50": ".0f", "p90": ".0f", "p99": ".0f", "errors": ".0f"}
SHARES = {"p50": 0.5, "p90": 0.9, "p99": 0.99}


def haproxy(balance: str, limit: str = "") -> Contender:
    """Return HAProxy with a way of balancing."""
    line = f"    server sN 127.0.0.1:PORT check inter 500ms fall 2 rise 1 {limit}"
    return Contender(
        lambda site: ["-db", "-q", "-f", "FILE"],
        "haproxy",
        "sessions.cfg",
        lambda site: {"balance": balance, "servers": site.each(line)},
    )


def vllm_router(site: Site) -> list[str]:
    """Return the words of vllm-router with its own policy for caches."""
    options = {name: value for name, (value, _) in VLLM_ROUTER.items()}
    options |= {"--policy": "cache_aware", "--request-timeout-secs": round(TIMEOUT)}
    servers = [f"http://127.0.0.1:{port}" for port in site.upstreams]
    own = ["--port", str(site.port), "--prometheus-port", str(free_port())]
    return [*own, "--worker-urls", *servers, *(str(w) for pair in options.items() for w in pair)]


def gateway(*options: str) -> Contender:
    """Return the gateway of this repository."""
    usual = ("--route", f"POST {PATH} hedge=on", "--deadline-ms", f"{1000 * TIMEOUT:.0f}")

    def words(site: Site) -> list[str]:
        urls = [f"--upstream=http://127.0.0.1:{port}" for port in site.upstreams]
        return ["gateway", "--port", str(site.port), *urls, *usual, *options]

    return Contender(words)


CONTENDERS = {
    "gateway": gateway(),
    "gateway-prefix": gateway("--affinity", "prefix"),
    "gateway-header": gateway("--affinity", "x-session"),
    "haproxy-hash": haproxy("balance hdr(x-session)\n    hash-type consistent"),
    "haproxy-leastconn": haproxy("balance leastconn", "maxconn 2"),
    "vllm-router": Contender(vllm_router, "vllm-router"),
}


@dataclass
class Chats:
    """The clients.

    Attributes:
        url: of the contender.
        seed: of what they say and when.
        times: of first tokens, in ms; infinite without one.
        errors: requests without an answer, or with one of another session.
    """

    url: str
    seed: int
    times: list[float] = field(default_factory=list)
    errors: int = 0

    async def run(self, at_third: Callable[[], Awaitable[None]]) -> None:
        """Hold all sessions; call `at_third` when a third of them have begun."""
        starts = np.cumsum(np.random.default_rng(self.seed).exponential(START, SESSIONS))
        sessions = [self._session(n, float(at)) for n, at in enumerate(starts)]

        async def inflict() -> None:
            await asyncio.sleep(float(starts[SESSIONS // 3]))
            await at_third()

        await asyncio.gather(inflict(), *sessions)

    async def _session(self, number: int, at: float) -> None:
        rng = np.random.default_rng([self.seed, number])

        def text(size: int) -> str:
            return bytes(rng.integers(97, 123, size, np.uint8)).decode()

        shared = bytes(np.random.default_rng(self.seed).integers(97, 123, SYSTEM, np.uint8))
        messages = [{"role": "system", "content": shared.decode()}]
        await asyncio.sleep(at)
        for _ in range(TURNS):
            size = int(SAID * rng.lognormal(-0.125, 0.5))
            messages.append({"role": "user", "content": text(size)})
            await self._ask(f"s{number}", messages)
            messages.append({"role": "assistant", "content": text(ANSWERED)})
            await asyncio.sleep(rng.exponential(THINK))

    async def _ask(self, session: str, messages: Sequence[dict[str, str]]) -> None:
        """Send a turn on a connection of its own, and time the first token."""
        request = {"model": "m", "stream": True, "user": session, "messages": messages}
        body = json.dumps(request).encode()
        head = f"POST {PATH} HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
        head += f"x-session: {session}\r\ncontent-length: {len(body)}\r\nconnection: close\r\n\r\n"
        began, first, whole = time.perf_counter(), float("inf"), b""
        origin, writer = parse_origin(self.url), None
        try:
            async with asyncio.timeout(TIMEOUT):
                reader, writer = await asyncio.open_connection(origin.host, origin.port)
                writer.write(head.encode() + body)
                whole = await reader.readuntil(b'"content"')
                first = 1000 * (time.perf_counter() - began)
                whole += await reader.read()
        except (OSError, TimeoutError, asyncio.IncompleteReadError):
            pass
        finally:
            if writer is not None:
                writer.close()
        self.times.append(first)
        own = whole.count(f'"content": "{session} "'.encode())
        is_right = own == whole.count(b'"content"') > 0 and b"[DONE]" in whole
        self.errors += not is_right


class Replicas:
    """The engines' processes."""

    def __init__(self, fault: str, stack: ExitStack) -> None:
        self.fault, self._stack = fault, stack
        slow = (SLOW, PAUSE) if fault == "slow" else (1.0, 0.0)
        self.engines = [
            Engine(free_port(), factor=factor, pause=pause)
            for factor, pause in (slow, *[(1.0, 0.0)] * (REPLICAS - 1))
        ]
        self._running = [self._start(engine) for engine in self.engines]
        self._before = 0.0
        """Seconds of prefill of processes that were killed."""

    def _start(self, engine: Engine) -> Running:
        return self._stack.enter_context(running(*command(engine), ready="(ready)"))

    async def inflict(self) -> None:
        """Do to the first replica what the fault says."""
        first = self._running[0]
        if self.fault == "stalled":
            os.kill(first.pid, signal.SIGSTOP)
            await asyncio.sleep(STANDS)
            os.kill(first.pid, signal.SIGCONT)
        elif self.fault == "restarted":
            self._before = await self._prefill(self.engines[0])
            first.process.kill()
            await asyncio.sleep(DOWN)
            self._running[0] = await asyncio.to_thread(self._start, self.engines[0])

    async def prefill(self) -> float:
        """Return the seconds of prefill that all replicas spent."""
        return self._before + sum([await self._prefill(engine) for engine in self.engines])

    async def _prefill(self, engine: Engine) -> float:
        client = HttpClient(parse_origin(f"http://127.0.0.1:{engine.port}"))
        found = json.loads((await client.ask("GET", "/stats", 10.0)).body)["prefill"]
        client.close()
        return float(found)


async def is_up(url: str) -> None:
    """Wait until a contender passes requests on."""
    client = HttpClient(parse_origin(url))
    for _ in range(300):
        try:
            if (await client.ask("GET", "/v1/models", 2.0)).status == 200:
                break
        except OSError:
            pass
        await asyncio.sleep(0.1)
    else:
        raise UserError(f"{url} did not answer within half a minute")
    client.close()


def trial(peer: str, fault: str, seed: int) -> dict[str, Any]:
    """Hold the sessions before one contender; return its row."""
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        replicas, port = Replicas(fault, stack), free_port()
        ports = [engine.port for engine in replicas.engines]
        words = CONTENDERS[peer].command(Site(Path(folder), port, ports, slots=2))
        stack.enter_context(running(*words, ready="", log=Path(folder) / "log"))
        chats = Chats(f"http://127.0.0.1:{port}", seed)

        async def run() -> float:
            await is_up(chats.url)
            await chats.run(replicas.inflict)
            return await replicas.prefill()

        seconds = asyncio.run(run())
    found = {name: percentile(chats.times, share) for name, share in SHARES.items()}
    return {"fault": fault, "peer": peer, "prefill s": seconds, **found, "errors": chats.errors}


def run(*, peer: Sequence[str] | None, fault: Sequence[str] | None, seeds: int) -> dict[str, Any]:
    """Measure contenders in turn; return the rows with their table.

    Raises:
        UserError: if a name is none of them, or a contender is not installed or does not start.
    """
    for option, names, known in (("--peer", peer, CONTENDERS), ("--fault", fault, FAULTS)):
        for name in names or ():
            if name not in known:
                raise UserError(f"{option}: must be one of {', '.join(known)}, got {name!r}")
    rows = []
    for name in fault or FAULTS:
        for one in peer or CONTENDERS:
            found = [trial(one, name, seed) for seed in range(seeds)]
            numbers = {key: statistics.median(row[key] for row in found) for key in FORMATS}
            rows.append({"fault": name, "peer": one, **numbers})
            print(tables.markdown(DataFrame(rows[-1:]), FORMATS).splitlines()[-1], flush=True)
    return {"rows": rows, "table": tables.markdown(DataFrame(rows), FORMATS).strip()}
