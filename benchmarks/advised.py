"""`python -m benchmarks advised`: does what `advise` predicts come true after each switch?

One service for each straggler model, as in `bench latency`: eleven workers, which wait besides
computing. It is loaded under one policy, asked for advice, goes over to the next policy while it
runs, and is loaded again. A prediction is made before the switch, and judged by what the client
measures after it.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from codedinvnet.bench.latency_grid import injected
from codedinvnet.bench.load import Client
from codedinvnet.bench.service import WARM_REQUESTS, ParityWait, schedule, serving
from codedinvnet.data import sample_images
from codedinvnet.errors import UserError
from codedinvnet.files import check_writable, write_json
from codedinvnet.provenance import describe_commit, describe_machine
from codedinvnet.quantiles import percentile, rounded
from codedinvnet.simulation.advise import CLOSE, AdviseOptions, advise

SERVED, K, WORKERS = "mnist", 10, 11
WAIT, SERVICE, ENCODE = 40.0, 42.0, 1.6
"""What a task waits, what a data task takes with it, and what encoding waits for each image, ms."""
BATCH, LOAD = 10, 0.4
MODELS = ("none", "held", "exponential", "pareto", "slower", "hung")
POLICIES = ("uncoded", "hedge", "coded", "coded+hedge")
SWITCHES = {"none": 3, "held": 3, "exponential": 4, "pareto": 4, "slower": 3, "hung": 3}
QUICK_MODELS = ("exponential", "slower")
REQUESTS, QUICK_REQUESTS = 1500, 400
QUERIES, QUICK_QUERIES = 60_000, 10_000
TOLERANCE = 0.15


def run(out: Path, *, quick: bool = False, seed: int = 0) -> dict[str, Any]:
    """Switch policies, and write how the predictions did.

    Args:
        out: the report (JSON); the services' log lies beside it.
        quick: two models and few requests.
        seed: of arrivals, images and faults.

    Raises:
        UserError: if a service does not start, or what it saw is too little.
    """
    check_writable(out)
    models = QUICK_MODELS if quick else MODELS
    rows: list[dict[str, Any]] = []
    for model in models:
        rows += asyncio.run(_switches(model, quick, seed, out.with_suffix(".log")))
    report = {
        "schema_version": 1,
        "kind": "advised",
        **judged(rows),
        "requests": QUICK_REQUESTS if quick else REQUESTS,
        "rows": rows,
        "machine": describe_machine(),
        "commit": describe_commit(),
    }
    write_json(out, report)
    return {**report, "table": "\n".join(lines(report))}


def judged(rows: Sequence[Mapping[str, Any]]) -> dict[str, int]:
    """Return how many switches there were, and how many predictions of them held.

    The best policy has the lowest p99 of those that were measured under the model; one within CLOSE
    of it is as good.
    """
    lowest: dict[str, float] = {}
    measured: dict[tuple[str, str], float] = {}
    for row in rows:
        for policy, value in row["measured_p99_ms"].items():
            measured[row["stragglers"], policy] = value
            lowest[row["stragglers"]] = min(value, lowest.get(row["stragglers"], value))
    near = sum(abs(row["predicted_ms"] / row["then_ms"] - 1) <= TOLERANCE for row in rows)
    named = sum(
        measured.get((row["stragglers"], row["best_of_measured"]), np.inf)
        <= (1 + CLOSE) * lowest[row["stragglers"]]
        for row in rows
    )
    return {"switches": len(rows), "within_15_percent": near, "best_named": named}


async def _switches(model: str, quick: bool, seed: int, log: Path) -> list[dict[str, Any]]:
    """Return a row for each switch under a straggler model."""
    faults = schedule(WAIT, K, ParityWait(WAIT, ENCODE), injected(model, SERVICE, BATCH))
    images = sample_images(SERVED).images.numpy()
    order = [POLICIES[i % len(POLICIES)] for i in range(SWITCHES[model] + 1)]
    rows: list[dict[str, Any]] = []
    measured: dict[str, float] = {}
    options = [SERVED, "--k", str(K), "--workers", str(WORKERS), "--policy", order[0]]
    async with serving(
        [*options, "--group-timeout-ms", "50"],
        faults,
        seed=seed,
        model=SERVED,
        inputs={"images": images},
        first=[[i] for i in range(WARM_REQUESTS)],
        log=log,
    ) as service:
        for place, policy in enumerate(order):
            if place:
                rows.append(await _advice(service.client, model, policy, quick, seed))
                await _change(service.client, policy)
            late = await _load(service.client, quick, seed + place, f"{model}, {policy}")
            measured[policy] = late
            if place:
                rows[-1]["then_ms"] = rounded(late, 2)
    for row in rows:
        row["measured_p99_ms"] = {name: rounded(late, 2) for name, late in measured.items()}
        known = {name: row["all_predicted_ms"][name] for name in measured}
        row["best_of_measured"] = min(known, key=lambda name: known[name] or np.inf)
    return rows


async def _advice(
    client: Client, model: str, policy: str, quick: bool, seed: int
) -> dict[str, Any]:
    """Ask for advice; return what it predicts of the policy that comes next."""
    raw = await client.get("traffic")
    queries = QUICK_QUERIES if quick else QUERIES
    told = advise(raw, AdviseOptions(client.address, queries=queries, seed=seed))
    predicted = {row["policy"]: row["p99_ms"] for row in told["simulated"]}
    return {
        "stragglers": model,
        "from": told["policy"],
        "to": policy,
        "predicted_ms": predicted[policy],
        "advice": told["advice"],
        "all_predicted_ms": predicted,
        "fitted": told["stragglers"],
    }


async def _change(client: Client, policy: str) -> None:
    async with client.session.post(f"{client.address}/policy", json={"policy": policy}) as reply:
        if reply.status != 200:
            raise UserError(f"the service did not go over to {policy}: {await reply.text()}")


async def _load(client: Client, quick: bool, seed: int, label: str) -> float:
    """Send requests; return their p99 in ms, infinite if too many were not answered."""
    chooser = random.Random(seed)
    count = QUICK_REQUESTS if quick else REQUESTS
    images = [[chooser.randrange(client.count) for _ in range(BATCH)] for _ in range(count)]
    rate = LOAD * 1000 * WORKERS / SERVICE / BATCH
    replies = await client.load(images, rate=rate, seed=seed, label=label)
    return percentile([1000 * r.latency if r.ok else np.inf for r in replies], 0.99)


def lines(report: Mapping[str, Any]) -> list[str]:
    """Return what people are told."""
    found = [
        f"{'stragglers':<12} {'from':<12} {'to':<12} {'predicted':>10} {'measured':>10}  advice"
    ]
    for row in report["rows"]:
        found.append(
            f"{row['stragglers']:<12} {row['from']:<12} {row['to']:<12} "
            f"{row['predicted_ms']:>10.1f} {row['then_ms']:>10.1f}  {row['advice']}"
        )
    return [
        *found,
        "",
        f"p99 within {TOLERANCE:.0%}: {report['within_15_percent']} of {report['switches']}; the "
        f"best policy, or one as good, named: {report['best_named']} of {report['switches']}",
    ]
