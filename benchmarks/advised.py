"""`python -m benchmarks advised`: does what `advise` predicts come true after each switch?

One service for each straggler model, as in `bench latency`: eleven workers, which wait besides
computing. It is loaded under one policy, asked for advice, goes over to the next policy while it
runs, and is loaded again. A prediction is made before the switch, and judged by what the client
measures after it. Requests are of two images: enough of them lie beyond p99 in a short load, and
one straggler in a hundred tasks hits two of them. Of single ones p99 would lie at an edge.

Four policies are offered. Neither `auto`, `replicate` nor a small backup is tested, of which
`advise` tells as well, and no bursts.

A p99 of few requests is itself a draw, so that none could foretell it well. Two things keep it from
deciding. Every load has thousands of requests, and all of one straggler model have the same
arrivals. What is left is told: how often one half of a load foretells the p99 of its other half.
The best policy by the first halves is compared with that by the second ones, too. No advice does
much better. On a quiet machine it takes 45 minutes, and 5 with --quick. Finished models are kept.
"""

from __future__ import annotations

import asyncio
import math
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from pandas import DataFrame

from codedinvnet.data import sample_images
from codedinvnet.errors import UserError
from codedinvnet.evaluation import tables
from codedinvnet.evaluation.client import Client
from codedinvnet.evaluation.latency_grid import injected
from codedinvnet.evaluation.quantiles import percentile, rounded
from codedinvnet.evaluation.service import WARM_REQUESTS, ParityWait, schedule, serving
from codedinvnet.files import check_writable, read_json, write_json
from codedinvnet.provenance import describe_commit, describe_machine
from codedinvnet.rows import seed_of
from codedinvnet.simulation.advise import AdviseOptions, advise
from codedinvnet.simulation.figures import SAME, latency_of

SERVED, K, WORKERS = "mnist", 10, 11
WAIT, SERVICE, ENCODE = 40.0, 42.0, 1.6
"""What a task waits, what a data task takes with it, and what encoding waits for each image, ms."""
BATCH, LOAD = 2, 0.4
MODELS = ("none", "held", "exponential", "pareto", "slower", "hung")
POLICIES = ("uncoded", "hedge", "coded", "coded+hedge")
SWITCHES = {"none": 3, "held": 3, "exponential": 4, "pareto": 4, "slower": 3, "hung": 3}
QUICK_MODELS = ("exponential", "slower")
REQUESTS, QUICK_REQUESTS = 4500, 1200
QUERIES, QUICK_QUERIES = 60_000, 10_000
TOLERANCE = 0.15
SCORES = (
    "within_15_percent",
    "lowest_predicted_best",
    "advice_best",
    "halves_within_15_percent",
    "halves_best_named",
)
ONE_POLICY = "one_policy_best"
"""How often whoever always names the same policy is right, if it is the one that is so most."""


class Late(NamedTuple):
    """The p99 of a load, in ms; infinite if too many were not answered."""

    whole: float
    halves: tuple[float, float]


def run(out: Path, *, quick: bool = False, seed: int = 0) -> dict[str, Any]:
    """Switch policies, and write how the predictions did.

    Args:
        out: the report (JSON); the services' log lies beside it.
        quick: two models and few requests.
        seed: of arrivals, images and faults.

    Raises:
        UserError: if a service does not start, what it saw is too little, or the file holds
            something else.
    """
    check_writable(out)
    head = {
        "schema_version": 1,
        "kind": "advised",
        "requests": QUICK_REQUESTS if quick else REQUESTS,
        "seed": seed,
        "machine": describe_machine(),
        "commit": describe_commit(),
    }
    rows = _kept(out, head)
    for model in QUICK_MODELS if quick else MODELS:
        if all(row["stragglers"] != model for row in rows):
            rows += asyncio.run(switches(model, quick, seed, out.with_suffix(".log")))
            write_json(out, {**head, **judged(rows), "rows": rows})
    report = {**head, **judged(rows), "rows": rows}
    return {**report, "table": "\n".join(lines(report))}


def _kept(out: Path, head: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the rows of a run that was interrupted, or is finished; [] if there was none."""
    if not out.is_file():
        return []
    found = read_json(out)
    if not isinstance(found, dict) or any(
        found.get(name) != head[name] for name in ("kind", "requests", "seed", "commit")
    ):
        raise UserError(f"{out} holds another report: name another file, or move it away")
    return list(found["rows"])


def judged(rows: Sequence[Mapping[str, Any]]) -> dict[str, int]:
    """Return how many switches there were, and how many predictions of them held.

    The best policy has the lowest p99 of those that were measured under the model; one within SAME
    of it is as good. Two policies are compared with it: the one with the lowest predicted p99, and
    the advice that was printed. What was not predicted, or never ended, is not near. The same is
    told of what first halves of the loads foretell of second ones, and of naming one policy always.
    """
    found, always = dict.fromkeys(SCORES, 0), dict.fromkeys(POLICIES, 0)
    for row in rows:
        measured = {name: latency_of(ms) for name, ms in row["measured_p99_ms"].items()}
        first, second = (
            {name: latency_of(ms[half]) for name, ms in row["halves_p99_ms"].items()}
            for half in (0, 1)
        )
        for policy in always:
            always[policy] += _as_good(policy, measured)
        to = row["to"]
        found["within_15_percent"] += _near(
            latency_of(row["predicted_ms"]), latency_of(row["then_ms"])
        )
        found["lowest_predicted_best"] += _as_good(row["best_of_measured"], measured)
        found["advice_best"] += _as_good(row["advice"], measured)
        found["halves_within_15_percent"] += _near(first[to], second[to])
        found["halves_best_named"] += _as_good(min(first, key=first.__getitem__), second)
    return {"switches": len(rows), **found, ONE_POLICY: max(always.values())}


def _near(predicted: float, then: float) -> bool:
    return then < math.inf and abs(predicted / then - 1) <= TOLERANCE


def _as_good(named: str | None, measured: Mapping[str, float]) -> bool:
    late = math.inf if named is None else measured.get(named, math.inf)
    return late < math.inf and late <= (1 + SAME) * min(measured.values())


def order_of(model: str) -> list[str]:
    """Return the policies under which a straggler model is met, one after another."""
    return [POLICIES[place % len(POLICIES)] for place in range(SWITCHES[model] + 1)]


def predicted(raw: Any, model: str, policy: str, queries: int, seed: int) -> dict[str, Any]:
    """Return what advice by a service's traffic says of the policy that comes next.

    Advice that is refused predicts nothing.
    """
    head = {"stragglers": model, "from": raw["policy"], "to": policy}
    try:
        asked = AdviseOptions("the service", queries=queries, seed=seed)
        told = advise({**raw, "offered": POLICIES}, asked)
    except UserError as error:
        nothing: dict[str, Any] = {
            "predicted_ms": None,
            "advice": None,
            "all_predicted_ms": {},
            "fitted": [],
        }
        return {**head, **nothing, "refused": str(error)}
    late = {row["policy"]: row["p99_ms"] for row in told["simulated"]}
    return {
        **head,
        "predicted_ms": late.get(policy),
        "advice": told["advice"],
        "all_predicted_ms": late,
        "fitted": told["stragglers"],
    }


def completed(
    rows: Sequence[Mapping[str, Any]], measured: Mapping[str, Late]
) -> list[dict[str, Any]]:
    """Return a model's rows with what was measured, and its policy of the lowest prediction."""
    told = {
        "measured_p99_ms": {name: rounded(late.whole, 2) for name, late in measured.items()},
        "halves_p99_ms": {
            name: [rounded(half, 2) for half in late.halves] for name, late in measured.items()
        },
    }
    found = []
    for row in rows:
        known = {n: ms for n in measured if (ms := row["all_predicted_ms"].get(n)) is not None}
        best = min(known, key=known.__getitem__) if known else None
        found.append({**row, **told, "best_of_measured": best})
    return found


async def switches(model: str, quick: bool, seed: int, log: Path) -> list[dict[str, Any]]:
    """Return a row for each switch under a straggler model, whose draws are its own."""
    seed = seed_of(seed, model)
    faults = schedule(WAIT, K, ParityWait(WAIT, ENCODE), injected(model, SERVICE, BATCH))
    images = sample_images(SERVED).images.numpy()
    order = order_of(model)
    rows: list[dict[str, Any]] = []
    measured: dict[str, Late] = {}
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
        queries = QUICK_QUERIES if quick else QUERIES
        for place, policy in enumerate(order):
            if place:
                raw = await service.client.get("traffic")
                rows.append(predicted(raw, model, policy, queries, seed))
                await _change(service.client, policy)
            late = await _load(service.client, quick, seed, f"{model}, {policy}")
            measured[policy] = late
            if place:
                rows[-1]["then_ms"] = rounded(late.whole, 2)
    return completed(rows, measured)


async def _change(client: Client, policy: str) -> None:
    async with client.session.post(f"{client.address}/policy", json={"policy": policy}) as reply:
        if reply.status != 200:
            raise UserError(f"the service did not go over to {policy}: {await reply.text()}")


async def _load(client: Client, quick: bool, seed: int, label: str) -> Late:
    """Send requests; return how late they were."""
    chooser = random.Random(seed)
    count = QUICK_REQUESTS if quick else REQUESTS
    images = [[chooser.randrange(client.count) for _ in range(BATCH)] for _ in range(count)]
    rate = LOAD * 1000 * WORKERS / SERVICE / BATCH
    replies = await client.load(images, rate=rate, seed=seed, label=label)
    return late_of([1000 * r.latency if r.ok else math.inf for r in replies])


def late_of(latency: Sequence[float]) -> Late:
    """Return the p99 of requests in order of their coming."""
    middle = len(latency) // 2
    first, second = (percentile(half, 0.99) for half in (latency[:middle], latency[middle:]))
    return Late(percentile(latency, 0.99), (first, second))


def lines(report: Mapping[str, Any]) -> list[str]:
    """Return what people are told."""
    shown = [
        {
            "stragglers": row["stragglers"],
            "from": row["from"],
            "to": row["to"],
            "predicted, ms": row["predicted_ms"],
            "measured, ms": row["then_ms"],
            "its halves, ms": " and ".join(
                "-" if ms is None else f"{ms:.1f}" for ms in row["halves_p99_ms"][row["to"]]
            ),
            "lowest predicted": row.get("refused") or row["best_of_measured"],
            "advice": row["advice"],
        }
        for row in report["rows"]
    ]
    formats = dict.fromkeys(("predicted, ms", "measured, ms"), ".1f")
    near, lowest, advice, halves, halves_named = (report[score] for score in SCORES)
    count = report["switches"]
    return [
        tables.markdown(DataFrame(shown), formats).strip(),
        "",
        f"p99 came within {TOLERANCE:.0%} of its prediction in {near} of {count} switches. A "
        f"policy is right if it was the best, or within {SAME:.0%} of it. The policy with the "
        f"lowest prediction was right in {lowest} of {count}, and the advice in {advice}. Naming "
        f"one policy always is right in {report[ONE_POLICY]} at most. One half of a load foretold "
        f"the p99 of its other half in {halves}, and the best policy in {halves_named}.",
    ]


def table(path: Path) -> str:
    """Return a report's switches, as Markdown."""
    return "\n".join(lines(read_json(path)))
