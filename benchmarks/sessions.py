"""`python -m benchmarks sessions`: replicas that cache the beginnings of prompts, through proxies.

A replica that has served a session computes only what is new, see `benchmarks.engines`. Each
contender gets the same requests; replicas begin with empty caches.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import re
import signal
import tempfile
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Any

import pandas as pd

from benchmarks import engines, prompts
from benchmarks.engines import Engine, command
from benchmarks.peers.contenders import CHAT as PATH
from benchmarks.peers.contenders import EXAMPLE, VLLM_ROUTER, Contender, Site, envoy_words
from benchmarks.processes import Running, running
from benchmarks.prompts import WORKLOADS, Chain, Turn
from benchmarks.stale import note
from codedinvnet.common.errors import UserError
from codedinvnet.common.grid import (
    Cell,
    expand,
    key_of,
    latest,
    read_rows,
    refuse_failures,
    resume,
    select,
)
from codedinvnet.common.quantiles import percentile
from codedinvnet.evaluation import tables
from codedinvnet.net.client import HttpClient, parse_origin
from codedinvnet.net.listening import free_port

REPLICAS, SLOTS = 3, 2
TIMEOUT = 60.0
FAULTS = {
    "none": "nothing wrong",
    "slow": "one replica slow",
    "stalled": "one replica stands still",
    "restarted": "one replica restarts",
}
"""The first replica takes 20 times as long and a second; stands still for STANDS seconds; is killed
and started again after DOWN seconds."""
SLOW, PAUSE, STANDS, DOWN = 20.0, 1.0, 5.0, 2.0
SHARES = {"p50": 0.5, "p90": 0.9, "p99": 0.99}
QUICK = {("chats", fault) for fault in FAULTS} | {("documents", "slow"), ("trace", "slow")}
QUICK_PEERS = ("gateway-header", "haproxy-hash", "vllm-router")
SEEDS, QUICK_SEEDS = 3, 1
MEASURE = "python -m benchmarks sessions --out docs/results/sessions.jsonl"
CONTENT = re.compile(rb'"content": ?"(\w+) "')
"""A token, by which replicas name the session that they answer."""
CLOSE = 1.1
"""What is at most so many times the best figure is level with it."""


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
    own = ["--port", str(site.port), "--prometheus-port", str(site.port + 4000)]
    return [*own, "--worker-urls", *servers, *(str(w) for pair in options.items() for w in pair)]


def gateway(*options: str) -> Contender:
    """Return the gateway of this repository."""
    usual = ("--route", f"POST {PATH} hedge=on", "--deadline-ms", f"{1000 * TIMEOUT:.0f}")

    def words(site: Site) -> list[str]:
        urls = [f"--upstream=http://127.0.0.1:{port}" for port in site.upstreams]
        return ["gateway", "--port", str(site.port), *urls, *usual, *options]

    return Contender(words)


def envoy(site: Site) -> dict[str, object]:
    """Return what is filled into Envoy's configuration."""
    address = "{socket_address: {address: 127.0.0.1, port_value: PORT}}"
    return {"servers": site.each(f"        - endpoint: {{address: {address}}}")}


def litellm(site: Site) -> dict[str, object]:
    """Return what is filled into LiteLLM's configuration."""
    url = 'api_base: "http://127.0.0.1:PORT/v1"'
    told = f"{{model: openai/m, {url}, api_key: none, allowed_openai_params: [user]}}"
    model = f"  - model_name: m\n    litellm_params: {told}"
    return {"servers": site.each(model)}


HASH = "balance hdr(x-session)\n    hash-type consistent"
CONTENDERS = {
    "gateway": gateway(),
    "gateway-prefix": gateway("--affinity", "prefix"),
    "gateway-header": gateway("--affinity", "x-session"),
    "haproxy-hash": haproxy(HASH),
    "haproxy-bounded": haproxy(f"{HASH}\n    hash-balance-factor 125"),
    "haproxy-leastconn": haproxy("balance leastconn", f"maxconn {SLOTS}"),
    "envoy-hash": Contender(
        envoy_words,
        "envoy",
        "sessions-envoy.yaml",
        envoy,
    ),
    "vllm-router": Contender(vllm_router, "vllm-router"),
    "litellm": Contender(
        lambda site: ["--config", "FILE", "--host", "127.0.0.1", "--port", str(site.port)],
        "litellm",
        "sessions-litellm.yaml",
        litellm,
    ),
}
TITLES = {
    "gateway-header": "the gateway, `x-session`",
    "gateway-prefix": "the gateway, `prefix`",
    "haproxy-hash": "HAProxy, hash",
    "haproxy-bounded": "HAProxy, hash, bounded",
    "envoy-hash": "Envoy, hash, bounded",
    "vllm-router": "vllm-router, `cache_aware`",
    "litellm": "LiteLLM",
}
"""Contenders that are measured unless others are named."""


@dataclass(frozen=True)
class Trial:
    """One measurement.

    Attributes:
        workload: one of WORKLOADS.
        fault: one of FAULTS.
        peer: one of CONTENDERS.
        seed: of what clients say and when.
    """

    workload: str
    fault: str
    peer: str
    seed: int

    @property
    def settings(self) -> dict[str, str]:
        """What rows of another configuration or another load differ in."""
        modules = (engines, prompts)
        sources = [Path(str(module.__file__)).read_bytes() for module in modules]
        return {
            "configuration": key_of(CONTENDERS[self.peer].configuration(EXAMPLE)),
            "load": sha256(b"".join([*sources, prompts.TRACE.read_bytes()])).hexdigest()[:16],
        }


@dataclass
class Clients:
    """The clients.

    Attributes:
        url: of the contender.
        chains: what they ask.
        times: of first tokens, in ms; infinite without one.
        errors: requests without an answer, or with one of another session.
    """

    url: str
    chains: Sequence[Chain]
    times: list[float] = field(default_factory=list)
    errors: int = 0

    async def run(self, at_third: Callable[[], Awaitable[None]]) -> None:
        """Ask everything; call `at_third` when a third of the chains have begun."""
        starts = sorted(chain[0].pause for chain in self.chains)

        async def inflict() -> None:
            await asyncio.sleep(starts[len(starts) // 3])
            await at_third()

        async def ask(chain: Chain) -> None:
            for turn in chain:
                await asyncio.sleep(turn.pause)
                await self._ask(turn)

        await asyncio.gather(inflict(), *map(ask, self.chains))

    async def _ask(self, turn: Turn) -> None:
        """Send a request on a connection of its own, and time the first token."""
        session = turn.session
        request = {"model": "m", "stream": True, "user": session, "messages": turn.messages}
        body = json.dumps(request).encode()
        named = f"x-session: {session}\r\nx-litellm-session-id: {session}\r\n"
        head = f"POST {PATH} HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
        head += f"{named}content-length: {len(body)}\r\nconnection: close\r\n\r\n"
        began, first, whole = time.perf_counter(), float("inf"), b""
        origin, writer = parse_origin(self.url), None
        try:
            async with asyncio.timeout(TIMEOUT):
                reader, writer = await asyncio.open_connection(origin.host, origin.port)
                writer.write(head.encode() + body)
                while data := await reader.read(1 << 16):
                    whole += data
                    if first == float("inf") and CONTENT.search(whole):
                        first = 1000 * (time.perf_counter() - began)
        except (OSError, TimeoutError):
            pass
        finally:
            if writer is not None:
                writer.close()
        self.times.append(first)
        told = set(CONTENT.findall(whole))
        self.errors += told != {session.encode()} or b"[DONE]" not in whole


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
    for _ in range(600):
        try:
            if (await client.ask("GET", "/v1/models", 2.0)).status == 200:
                break
        except OSError:
            pass
        await asyncio.sleep(0.1)
    else:
        raise UserError(f"{url} did not answer within a minute")
    client.close()


def measure(trial: Trial) -> dict[str, Any]:
    """Have one contender do all of a workload; return the figures."""
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        replicas, port = Replicas(trial.fault, stack), free_port()
        ports = [engine.port for engine in replicas.engines]
        words = CONTENDERS[trial.peer].command(Site(Path(folder), port, ports, slots=SLOTS))
        stack.enter_context(running(*words, ready="", log=Path(folder) / "log"))
        clients = Clients(f"http://127.0.0.1:{port}", WORKLOADS[trial.workload](trial.seed))

        async def run() -> float:
            await is_up(clients.url)
            await clients.run(replicas.inflict)
            return await replicas.prefill()

        seconds = asyncio.run(run())
    found = {name: percentile(clients.times, share) for name, share in SHARES.items()}
    limit = 1000 * TIMEOUT  # an error is as bad as the longest wait
    figures = {name: round(min(value, limit), 1) for name, value in found.items()}
    requests = len(clients.times)
    return {"prefill": round(seconds, 2), **figures, "errors": clients.errors, "requests": requests}


def planned(peers: Sequence[str], seeds: int, quick: bool) -> Iterator[Trial]:
    """Yield the trials, the contenders of each situation one after the other in random order."""
    rng = random.Random(0)
    for axes in expand(seed=range(1, seeds + 1), workload=WORKLOADS, fault=FAULTS):
        if not quick or (axes["workload"], axes["fault"]) in QUICK:
            for peer in rng.sample(peers, len(peers)):
                yield Trial(peer=peer, **axes)


def run(
    *,
    quick: bool,
    peer: Sequence[str] | None,
    only: Sequence[str],
    seeds: int | None,
    out: Path,
) -> dict[str, Any]:
    """Measure what is missing, and return the table; see `benchmarks.command_line`.

    Raises:
        UserError: if a name is none of them, or a trial fails.
    """
    if unknown := set(peer or ()) - set(CONTENDERS):
        known = ", ".join(CONTENDERS)
        raise UserError(f"--peer: must be one of {known}, got {', '.join(sorted(unknown))}")
    peers = peer or (QUICK_PEERS if quick else tuple(TITLES))
    found = list(planned(peers, seeds or (QUICK_SEEDS if quick else SEEDS), quick))
    cells = [
        Cell(
            "sessions",
            asdict(one),
            one.settings,
            partial(measure, one),
            " ".join((one.workload, one.fault, one.peer)),
        )
        for one in select(found, only, asdict)
    ]
    refuse_failures(resume(cells, out)["failed"], "of the trials", out)
    return {"rows": [], "table": table(out)}


def table(path: Path) -> str:
    """Return the table of a file: a line for each situation, a column for each contender."""
    place = ["workload", "fault", "peer"]
    rows = latest(read_rows(path, "sessions"), [*place, "seed"], ["seed"])
    figures = ["prefill", *SHARES, "errors"]
    medians = rows.groupby(place, sort=False)[figures].median()
    best = medians["p99"].groupby(place[:2], sort=False).transform("min")
    texts = []
    for (_, line), least in zip(medians.iterrows(), best, strict=True):
        times = " / ".join(f"{line[name]:.0f}" for name in SHARES)
        times = f"**{times}**" if line["p99"] <= CLOSE * least else times
        failed = f", {line['errors']:.0f} failed" if line["errors"] else ""
        texts.append(f"{line['prefill']:.1f}; {times}{failed}")
    cells = pd.Series(texts, medians.index).unstack("peer", sort=False)
    situations = [(workload, fault) for workload in WORKLOADS for fault in FAULTS]
    cells = cells.reindex([each for each in situations if each in cells.index])
    cells = cells[[name for name in CONTENDERS if name in cells]].rename(columns=TITLES)
    cells.insert(0, "", [f"{workload}, {FAULTS[fault]}" for workload, fault in cells.index])
    current = {one: Trial("chats", "none", one, 1).settings for one in CONTENDERS}
    old = {
        row["peer"] for _, row in rows.iterrows() if row["version"] != key_of(current[row["peer"]])
    }
    names = ", ".join(f"`{name}`" for name in sorted(old))
    told = note(f"rows of {names} are of an older configuration or load", MEASURE) if old else ""
    return f"{tables.markdown(cells).strip()}\n\n{told}".strip()
