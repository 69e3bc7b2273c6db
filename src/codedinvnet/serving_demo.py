"""The demonstration's second half: a real service, slow tasks, a killed worker, real queries."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from codedinvnet.data import sample_images
from codedinvnet.evaluation.client import Client, Reply, connect
from codedinvnet.evaluation.quantiles import percentile
from codedinvnet.processes import server

RATE = 100.0
"""Queries a second."""
QUERIES = 1000
SLOW_SHARE, SLOW_MS = 0.1, 150.0
KILLED_WORKER, KILLED_AFTER = 6, 4.0


def run_serving_demo(name: str, folder: Path, seed: int = 0) -> None:
    """Serve a bundle, send it its test images through HTTP while workers fail, print a table."""
    images, labels = sample_images(name).batch(torch.arange(QUERIES))
    replies = asyncio.run(_serve_and_load(name, images.numpy(), folder, seed))
    print(table(replies, labels.numpy()))


async def _serve_and_load(name: str, images: np.ndarray, folder: Path, seed: int) -> list[Reply]:
    slow = {
        "kind": "slow",
        "probability": SLOW_SHARE,
        "delay": {"distribution": "constant", "ms": SLOW_MS},
    }
    with tempfile.TemporaryDirectory() as place:
        faults = Path(place) / "faults.json"
        faults.write_text(json.dumps({"faults": [slow]}), encoding="utf-8")
        options = ("--k", "10", "--policy", "coded", "--faults", str(faults))
        folder.mkdir(parents=True, exist_ok=True)
        async with (
            server(name, *options, log=folder / "serve.log") as process,
            connect(process.address, name, images) as client,
        ):
            print(
                f"\nserving {name} on {process.address}: 11 workers, one task in "
                f"{1 / SLOW_SHARE:.0f} takes {SLOW_MS:.0f} ms longer, worker {KILLED_WORKER} is "
                f"killed after {KILLED_AFTER:.0f} s"
            )
            kill = asyncio.create_task(_kill(client))
            requests = [[row] for row in range(QUERIES)]
            replies = await client.load(requests, rate=RATE, seed=seed, label="query", leave=True)
            await kill
            return replies


async def _kill(client: Client) -> None:
    await asyncio.sleep(KILLED_AFTER)
    workers = (await client.get("page/state"))["workers"]
    os.kill(workers[KILLED_WORKER]["pid"], signal.SIGKILL)


def table(replies: Sequence[Reply], labels: np.ndarray) -> str:
    """Return count, accuracy and latency by outcome as a text table."""
    lines = [f"{'outcome':<9}{'count':>6}  {'accuracy':>8}  {'p50 ms':>7}  {'p99 ms':>7}"]
    for outcome in ("direct", "decoded", "guessed", "failed"):
        chosen = [r for r in replies if (r.outcomes[0] if r.ok else "failed") == outcome]
        if not chosen:
            lines.append(f"{outcome:<9}{0:>6}")
            continue
        right = [r.ok and int(r.labels[0]) == int(labels[r.rows[0]]) for r in chosen]
        latencies = [1000 * reply.latency for reply in chosen]
        lines.append(
            f"{outcome:<9}{len(chosen):>6}  {100 * sum(right) / len(right):>7.1f}%  "
            f"{percentile(latencies, 0.5):>7.1f}  {percentile(latencies, 0.99):>7.1f}"
        )
    return "\n".join(lines)
