"""`python -m benchmarks scheduling`: what the front end costs a query.

Three parts. The *rules*: the events of a simulated run are told to a scheduler of its own, and the
processor time is counted that it takes for them. The *simulator*: the processor time of a million
queries. *HTTP*: the time of one image, one after another, above what the forward pass itself took
in the worker. It is compared with a bare Starlette echo, and with LitServe on the same network.
"""

from __future__ import annotations

import asyncio
import base64
import gc
import itertools
import math
import os
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import aiohttp
import numpy as np
from pandas import DataFrame

from codedinvnet.bench import tables
from codedinvnet.bench.client import connect
from codedinvnet.data import sample_images
from codedinvnet.errors import UserError
from codedinvnet.processes import free_port, processor_time, server
from codedinvnet.serving.policies import served_as
from codedinvnet.serving.rules.scheduler import Scheduler
from codedinvnet.simulation.engine import Simulation
from codedinvnet.simulation.scenario import Scenario, parse_scenario
from codedinvnet.simulation.stragglers import stragglers

BUNDLE = "mnist"
POLICIES = ("uncoded", "hedge", "coded", "small-backup", "small-backup+hedge", "auto")
WORKERS, BATCHES = (11, 1000), (1, 10)
LOAD = 0.5
QUERIES = {11: 30_000, 1000: 60_000}
"""Queries of a run by its workers; at 1,000 a run must last longer than the queue takes to form."""
ROUNDS, REQUESTS = 5, 200
"""Over HTTP: rounds, and requests of each server in a round."""
START = 60.0
"""Seconds that a server has to start."""
RULES, SIMULATED = "rules, µs a query", "simulated, s a million"
P50, FORWARD, ABOVE = "p50, ms", "forward pass, ms", "above it, ms"
PROCESSOR = "processor of the front end, ms"
FORMATS = {
    **dict.fromkeys((RULES, SIMULATED), ".1f"),
    **dict.fromkeys((P50, FORWARD, ABOVE, PROCESSOR), ".2f"),
}
WITHOUT = (
    "LitServe is left out: `pip install --target FOLDER litserve` installs it, and `--litserve "
    "FOLDER` names it."
)


def scenario(policy: str, workers: int, batch: int, queries: int) -> Scenario:
    """Return a service under load, with stragglers."""
    raw = {
        **{"name": policy, "workers": workers, "queries": queries, "k": 10},
        **{"accuracy": {"normal": 1, "recovered": {1: {10: 1}}}},
        **{"method_accuracy": {"small-backup": {10: 1}}, "arrivals": {"qps": 1, "batch": batch}},
        **{"service": {"distribution": "lognormal", "ms": 42, "shape": 0.03}, "trip": 1.3},
    }
    base = parse_scenario({**raw, **served_as(policy).scenario}, policy)
    model = stragglers("pareto", base.service.mean_ms, batch)
    causes = [straggler.model_dump() for straggler in model]
    return base.updated(qps=LOAD * base.capacity_qps, stragglers=causes)


class Recorder:
    """A scheduler's stand-in, which takes down what the scheduler is told."""

    def __init__(self, scheduler: Scheduler) -> None:
        self._scheduler = scheduler
        self.events: list[tuple[str, tuple[Any, ...]]] = []

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._scheduler, name)
        if not callable(found):
            return found

        def told(*arguments: Any) -> Any:
            self.events.append((name, arguments))
            return found(*arguments)

        return told


def costs(given: Scenario) -> tuple[float, float]:
    """Return the microseconds of processor time a query takes: the rules alone, and simulated."""
    began = time.process_time()
    Simulation(given).run()
    simulated = time.process_time() - began
    run = Simulation(given)
    recorder = Recorder(run.scheduler)
    run.scheduler = recorder  # type: ignore[assignment]
    run.run()
    scheduler = Scheduler(given.rules, given.code)
    events = [(getattr(scheduler, name), arguments) for name, arguments in recorder.events]
    gc.collect()
    gc.freeze()  # a service has no such list of events to look through
    began = time.process_time()
    for event, arguments in events:
        event(*arguments)
    rules = time.process_time() - began
    gc.unfreeze()
    return 1e6 * rules / given.queries, 1e6 * simulated / given.queries


def processor(share: int = 1) -> list[dict[str, Any]]:
    """Return what scheduling and simulating costs, a row a policy and size.

    Args:
        share: part of the queries that are simulated.
    """
    rows = []
    for workers, policy, batch in itertools.product(WORKERS, POLICIES, BATCHES):
        rules, simulated = costs(scenario(policy, workers, batch, QUERIES[workers] // share))
        place = {"policy": policy, "workers": workers, "images": batch}
        rows.append({**place, RULES: rules, SIMULATED: simulated})
    return rows


Ask = Callable[[], Awaitable[float]]
"""Sends a request; returns the seconds that the forward pass of its answer took, 0 if there is
none."""


async def over_http(litserve: Path | None, share: int = 1) -> list[dict[str, Any]]:
    """Return the p50 of one image over HTTP, above the forward pass, a row a server.

    Args:
        litserve: folder that `pip install --target` installed LitServe in; None: it is left out.
        share: part of the requests that are sent.

    Raises:
        UserError: if a server does not start.
    """
    images = sample_images(BUNDLE).images.numpy()
    image = images[:1].tobytes()
    async with AsyncExitStack() as stack:
        process = await stack.enter_async_context(server(BUNDLE, "--workers", "1"))
        client = await stack.enter_async_context(connect(process.address, BUNDLE, images))

        async def ours() -> float:
            reply = await client.infer("", [0])
            if not reply.ok:
                raise UserError(f"the service answered {reply.status}")
            return 0.0

        arms: dict[str, Ask] = {"codedinvnet": ours}
        plain: list[tuple[str, str, Path | None]] = [("Starlette echo", "echo", None)]
        plain += [("LitServe", "litserve", litserve)] if litserve is not None else []
        for name, kind, folder in plain:
            url = await stack.enter_async_context(_plain(kind, folder))
            body: dict[str, Any] = {"data": image}
            if kind == "litserve":
                body = {"json": {"image": base64.b64encode(image).decode()}}
            arms[name] = _asking(client.session, url, body)
        latencies: dict[str, list[float]] = {name: [] for name in arms}
        passes: dict[str, list[float]] = {name: [] for name in arms}
        spent = 0.0
        for number in range(ROUNDS + 1):
            if number == 1:
                spent = processor_seconds(process.pid)
            for name, ask in arms.items():
                for _ in range(REQUESTS // share):
                    began = time.perf_counter()
                    forward = await ask()
                    if number:  # the first round only warms
                        latencies[name].append(1000 * (time.perf_counter() - began))
                        passes[name].append(1000 * forward)
        spent = processor_seconds(process.pid) - spent
        service = (await client.get("times"))["service"]
    median = float(np.interp(0.5, service["shares"], service["values_ms"]))
    passes["codedinvnet"] = [median]
    rows = []
    for name in arms:
        p50, forward = statistics.median(latencies[name]), statistics.median(passes[name])
        rows.append({"server": name, P50: p50, FORWARD: forward, ABOVE: p50 - forward})
    rows[0][PROCESSOR] = 1000 * spent / len(latencies["codedinvnet"])
    return rows


def processor_seconds(pid: int) -> float:
    """Return the seconds of processor time that a process has taken; NaN if nobody says it."""
    found = processor_time(pid)
    return math.nan if found is None else found.first


def _asking(session: aiohttp.ClientSession, url: str, body: dict[str, Any]) -> Ask:
    async def ask() -> float:
        async with session.post(url, **body) as response:
            found = await response.read()
            if response.status != 200:
                raise UserError(f"{url} answered {response.status}")
            json = response.content_type == "application/json"
            return float((await response.json())["seconds"]) if json and found else 0.0

    return ask


@asynccontextmanager
async def _plain(kind: str, folder: Path | None) -> AsyncIterator[str]:
    """Run `benchmarks.server_KIND`; yields the address that it answers at."""
    port = free_port()
    path = [str(folder)] if folder else []
    path += [os.getcwd(), *filter(None, [os.environ.get("PYTHONPATH")])]
    command = [sys.executable, "-m", f"benchmarks.server_{kind}", str(port), BUNDLE]
    process = subprocess.Popen(
        command,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(path)},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        until = time.monotonic() + START
        while process.poll() is None and time.monotonic() < until:
            await asyncio.sleep(0.2)
            try:
                _, writer = await asyncio.open_connection("127.0.0.1", port)
            except OSError:
                continue
            writer.close()
            break
        else:
            raise UserError(f"it does not start: {' '.join(command)}")
        yield f"http://127.0.0.1:{port}/predict"
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # its workers, too
        process.wait()


def run(
    part: str | None = None, litserve: Path | None = None, quick: bool = False
) -> dict[str, Any]:
    """Measure, and return the rows with their tables.

    Args:
        part: `processor` or `http`; None: both.
        litserve: see `over_http`.
        quick: a tenth of the queries and requests.

    Raises:
        UserError: if a server does not start.
    """
    share = 10 if quick else 1
    frames = []
    if part != "http":
        frames.append(DataFrame(processor(share)))
    if part != "processor":
        frames.append(DataFrame(asyncio.run(over_http(litserve, share))))
    text = [tables.markdown(frame, FORMATS).strip() for frame in frames]
    if part != "processor" and litserve is None:
        text.append(WITHOUT)
    rows = [row for frame in frames for row in frame.to_dict("records")]
    return {"rows": rows, "table": "\n\n".join(text)}
