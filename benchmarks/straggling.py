"""`python -m benchmarks straggling`: a protected model against hedging, under straggler models.

Every arm gets the same arrivals on real processes, and no more extra work than one task a group.
Workers share this machine's processors, so a wait beside the computing makes them behave as
machines of their own (docs/explanation/protocol.md).
"""

from __future__ import annotations

import asyncio
import json
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
import numpy as np
from tqdm import tqdm

from codedinvnet.bench.latency import ParityWait, latency_figures, work_figures
from codedinvnet.bench.latency_grid import injected
from codedinvnet.bench.load import Client, Reply, open_loop, server, warm
from codedinvnet.codes.base import Scheme
from codedinvnet.codes.rules import is_systematic
from codedinvnet.errors import UserError
from codedinvnet.files import read_json, write_json
from codedinvnet.models import OpenModel, open_model
from codedinvnet.models.base import DATATYPES, scores_tensor
from codedinvnet.protect.folder import load_protection, read_description
from codedinvnet.protect.images import Preprocessing
from codedinvnet.protect.inputs import Inputs, read_inputs
from codedinvnet.protect.teacher import scores_of
from codedinvnet.provenance import describe_commit, describe_machine
from codedinvnet.serving.opening import called
from codedinvnet.serving.workers.faults import Delay, Fault

STRAGGLERS = ("pareto", "held", "slower")
ARMS = ("hedge", "coded", "coded+hedge")
SERVICE_MS = 42.0
"""Mean service time, unless the model computes for long."""
BUSY = 0.5
"""Share of this machine's processors that computing may take."""
INPUTS = 500
"""Inputs that requests choose from."""
WARM = 30


@dataclass(frozen=True)
class Place:
    """What all arms have in common.

    Attributes:
        model: the served model.
        protection: its protection's folder.
        scheme: of the method.
        inputs: queries, (N, *shape) by name.
        wanted: the model's own answers, (N,).
        workers: of the service.
        load: share of their time that direct answers take.
        batch: queries of a request.
        requests: of a run.
        seed: of the arrivals.
        log: of the servers.
    """

    model: OpenModel
    protection: Path
    scheme: Scheme
    inputs: Mapping[str, np.ndarray]
    wanted: np.ndarray
    workers: int
    load: float
    batch: int
    requests: int
    seed: int
    log: Path


class OwnClient(Client):
    """Sends queries of any model, and reads their scores.

    Args:
        session: open HTTP session.
        address: of the server.
        place: what is sent.
    """

    def __init__(self, session: aiohttp.ClientSession, address: str, place: Place) -> None:
        name = called(place.model.source.source)
        super().__init__(session, address, name, np.zeros(0, np.uint8))
        self.place = place

    async def infer(self, identity: str, rows: Sequence[int], due: float | None = None) -> Reply:
        began = time.perf_counter() if due is None else due
        scores = self.place.model.signature.scores
        assert scores is not None
        datatype = scores_tensor(self.place.model.signature).datatype
        parts = [
            (spec, self.place.inputs[spec.name][list(rows)])
            for spec in self.place.model.signature.inputs
        ]
        head = json.dumps(
            {
                "id": identity,
                "inputs": [
                    {
                        "name": spec.name,
                        "shape": list(part.shape),
                        "datatype": spec.datatype,
                        "parameters": {"binary_data_size": part.nbytes},
                    }
                    for spec, part in parts
                ],
                "outputs": [
                    {"name": "outcome"},
                    {"name": scores.output, "parameters": {"binary_data": True}},
                ],
            }
        ).encode()
        body = head + b"".join(part.tobytes() for _, part in parts)
        headers = {"Inference-Header-Content-Length": str(len(head))}
        rows = tuple(rows)
        try:
            async with self.session.post(self.url, data=body, headers=headers) as response:
                body = await response.read()
        except (aiohttp.ClientError, asyncio.TimeoutError) as error:
            elapsed = time.perf_counter() - began
            return Reply(identity, rows, elapsed, error=f"{type(error).__name__}: {error}")
        latency = time.perf_counter() - began
        if response.status != 200:
            return Reply(identity, rows, latency, response.status, error=body.decode())
        length = int(response.headers["Inference-Header-Content-Length"])
        outcomes = json.loads(body[:length])["outputs"][0]["data"]
        found = np.frombuffer(body[length:], DATATYPES[datatype]).reshape(len(rows), -1)
        return Reply(
            identity, rows, latency, 200, identity, found.argmax(1), tuple(outcomes), found
        )


def run(
    protection: Path,
    model: Path,
    inputs: Path,
    *,
    method: str | None,
    scale: float | None,
    mean: Sequence[float],
    std: Sequence[float],
    workers: int,
    load: float,
    batch: int,
    requests: int,
    stragglers: Sequence[str],
    seed: int,
    out: Path,
    log: Path,
) -> dict[str, Any]:
    """Do all runs, and return a report of them; rows that `out` has are kept.

    Args:
        protection: the folder that `codedinvnet protect` wrote.
        model: of which it is the protection.
        inputs: as `codedinvnet protect` takes them.
        method: one of the protection's; None: the recommended one.
        scale: factor of pixels 0..255.
        mean: what is subtracted then, by channel.
        std: what divides then, by channel.
        workers: of the service.
        load: share of the workers' time that direct answers take.
        batch: queries of a request.
        requests: of a run.
        stragglers: names of straggler models.
        seed: of the arrivals.
        out: the rows, as JSON.
        log: the servers'.

    Raises:
        UserError: if the model or its protection cannot be served.
    """
    opened = open_model(model)
    scheme = load_protection(protection, opened, method)
    if not is_systematic(scheme.rules):
        raise UserError(f"{scheme.name} has no direct answers to copy: name another --method")
    needed = len(scheme.rules.tasks(scheme.rules.k))
    if workers < needed:
        raise UserError(f"--workers {workers}: {scheme.name} needs {needed}")
    how = Preprocessing(scale=scale, mean=tuple(mean), std=tuple(std))
    found = read_inputs(inputs, opened.signature, how)
    place = _place(opened, protection, scheme, found, workers, load, batch, requests, seed, log)
    compute = read_description(protection)["parts"]["the model: a query"]["ms"][0]
    service = _service_ms(compute, workers, load)
    rows: list[dict[str, Any]] = read_json(out) if out.is_file() else []
    done = {(row["stragglers"], row["policy"]) for row in rows}
    todo = [(s, arm) for s in stragglers for arm in ARMS if (s, arm) not in done]
    for straggler, arm in tqdm(todo, unit="run"):
        figures = asyncio.run(_measured(place, straggler, arm, service, compute))
        rows.append({"stragglers": straggler, "policy": arm, "method": scheme.name, **figures})
        write_json(out, rows)
    return {"rows": rows, "table": table(rows)}


def _service_ms(compute: float, workers: int, load: float) -> float:
    """Return a service time at which the processors are busy for no more than BUSY."""
    processors = len(os.sched_getaffinity(0))
    return max(SERVICE_MS, round(workers * load * compute / (BUSY * processors), 1))


def _place(
    model: OpenModel,
    protection: Path,
    scheme: Scheme,
    inputs: Inputs,
    workers: int,
    load: float,
    batch: int,
    requests: int,
    seed: int,
    log: Path,
) -> Place:
    rows = np.random.default_rng(seed).permutation(len(inputs))[:INPUTS]
    queries = inputs.batch(np.sort(rows))
    parts = [{name: array[i : i + 1] for name, array in queries.items()} for i in range(len(rows))]
    wanted = np.concatenate([scores_of(model, part).argmax(1) for part in parts])
    return Place(
        model, protection, scheme, queries, wanted, workers, load, batch, requests, seed, log
    )


async def _measured(
    place: Place, straggler: str, arm: str, service: float, compute: float
) -> dict[str, Any]:
    """Return the figures of one run."""
    k = place.scheme.rules.k
    extra = place.scheme.rules.tasks(k)[k]
    wait = max(0.0, service - compute)
    # What the extra task waits goes by its cost, for each of its queries.
    each = wait * extra.cost / len(extra.members)
    coded = arm != "hedge"
    waits = [Fault(kind="slow", delay=Delay(ms=wait), spread=True, until_task=k if coded else None)]
    if coded:
        delay = Delay(ms=each)
        waits.append(Fault(kind="slow", delay=delay, spread=True, from_task=k, each_image=True))
    faults = [*waits, *injected(straggler, service, place.batch)]
    path = place.log.with_name("faults.json")
    write_json(path, {"faults": [f.model_dump(mode="json", exclude_defaults=True) for f in faults]})
    words = [place.model.source.source, "--policy", arm, "--workers", str(place.workers)]
    words += ["--faults", str(path), "--group-timeout-ms", "50", "--k", str(k)]
    if coded:
        words += ["--protection", str(place.protection), "--method", place.scheme.name]
    rate = place.load * place.workers / (service / 1000) / place.batch
    drawn = np.random.default_rng(place.seed).integers(
        len(place.wanted), size=(place.requests, place.batch)
    )
    connector = aiohttp.TCPConnector(limit=0)
    async with (
        server(*words, log=place.log) as process,
        aiohttp.ClientSession(connector=connector) as session,
    ):
        client = OwnClient(session, process.address, place)
        await warm(client, drawn[:WARM].tolist(), place.log)
        before = await client.metrics()
        replies = await open_loop(
            lambda i, due: client.infer(str(i), drawn[i].tolist(), due),
            rate=rate,
            count=place.requests,
            seed=place.seed,
            label=f"{straggler} {arm}",
            leave=False,
        )
        after = await client.metrics()
    queries = place.requests * place.batch
    parity = ParityWait(0.0, each) if coded else None
    return {
        "workers": place.workers,
        "load": place.load,
        "batch": place.batch,
        "requests": place.requests,
        "service_ms": service,
        **latency_figures(replies),
        **answers(replies, place.wanted),
        **work_figures(before, after, queries, wait, parity),
        "commit": describe_commit(),
        "machine": describe_machine(),
    }


def answers(replies: Sequence[Reply], wanted: np.ndarray) -> dict[str, Any]:
    """Return how often answers are the model's own: of all queries, and of approximate answers."""
    answered = [reply for reply in replies if reply.ok]
    agrees = [
        bool(label == wanted[row])
        for reply in answered
        for row, label in zip(reply.rows, reply.labels, strict=True)
    ]
    outcomes = [outcome for reply in answered for outcome in reply.outcomes]
    late = [a for a, outcome in zip(agrees, outcomes, strict=True) if outcome != "direct"]
    return {
        "errors": len(replies) - len(answered),
        "agreement": sum(agrees) / len(agrees) if agrees else None,
        "approximate_share": len(late) / len(agrees) if agrees else None,
        "approximate_agreement": sum(late) / len(late) if late else None,
    }


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return the rows for a reader, as Markdown."""
    heads = ["stragglers", "policy", "p50 ms", "p99 ms", "p99.9 ms", "work", "agreement %"]
    heads += ["approximate %", "of them agree %"]
    lines = [heads, ["---"] * len(heads)]

    def percent(value: float | None) -> str:
        return "-" if value is None else f"{100 * value:.2f}"

    for row in rows:
        cells = [row["stragglers"], row["policy"]]
        cells += ["-" if row[f"{p}_ms"] is None else f"{row[f'{p}_ms']:.0f}" for p in PERCENTILES]
        cells.append(f"{row['work_per_query']:.3f}")
        names = ("agreement", "approximate_share", "approximate_agreement")
        cells += [percent(row[name]) for name in names]
        lines.append(cells)
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


PERCENTILES = ("p50", "p99", "p999")
