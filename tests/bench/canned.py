"""Rows of `bench accuracy` and `bench latency` without the benchmarks."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from codedinvnet.bench.latency import latency_figures
from codedinvnet.bench.load import Reply
from codedinvnet.bench.rows import SCHEMA_VERSION, key_of, pack_counts

GROUPS, K = 100, 10


def row(
    label: str,
    recovered: float,
    *,
    dataset: str = "mnist",
    base: str = "invertible",
    k: int = K,
    seed: int = 1,
    error: str | None = None,
    systematic: bool = True,
    epochs: int = 1,
) -> dict[str, Any]:
    """Return a row in which every group has the same share of right answers, or one more."""
    generator = torch.Generator().manual_seed(seed)
    extra = (torch.rand(GROUPS, generator=generator) < (recovered * k) % 1).long()
    correct = int(recovered * k) + extra
    trial = {
        "label": label,
        "method": label,
        "dataset": dataset,
        "base": base,
        "k": k,
        "missing": 1,
        "corrupt": 0,
        "seed": seed,
    }
    settings = {"quick": False, "epochs": epochs}
    figures: dict[str, Any] = {
        "normal": 0.95,
        "complete": 0.95 if systematic else 0.9,
        "recovered": recovered,
        "systematic": systematic,
        "r": 1,
        "confusion": [[8, 2], [1, 9]],
        "classes": ["cat", "dog"],
        "groups": [
            {"correct": pack_counts(correct), "scored": pack_counts(torch.full((GROUPS,), k))}
        ],
    }
    return {
        "schema_version": SCHEMA_VERSION,
        "key": key_of(trial, settings),
        **trial,
        "settings": settings,
        "machine": "a machine",
        **({} if error else figures),
        "error": error,
    }


MACHINE = "a machine"


def replies(milliseconds: np.ndarray, lost: int = 0) -> list[Reply]:
    found = [Reply(f"{i}", (0,), ms / 1000, 200) for i, ms in enumerate(milliseconds)]
    return found + [Reply("x", (0,), 0.1, 504) for _ in range(lost)]


def latency_row(
    label: str,
    milliseconds: np.ndarray,
    *,
    run: int = 1,
    lost: int = 0,
    accuracy: float = 0.99,
    error: str | None = None,
    stragglers: str = "pareto",
    quick: bool = False,
    wait_ms: float = 40.0,
    batch: int = 10,
) -> dict[str, Any]:
    """Return a row of `bench latency` whose requests took so long, and some of which were lost."""
    arm = {"label": label, "batch": batch, "load": 0.4, "straggler_model": stragglers, "run": run}
    settings = {"quick": quick, "wait_ms": wait_ms}
    count = len(milliseconds) + lost
    figures: dict[str, Any] = {
        **latency_figures(replies(milliseconds, lost), quick=quick),
        "queries": batch * count,
        "missing_share": lost / count,
        "decoded_share": 0.02,
        "accuracy": accuracy,
        "work_per_query": 1.11,
        "mean_service_ms": 42.1,
        "processors_busy": 0.4,
        "processors_busy_niced": None,
    }
    return {
        "schema_version": SCHEMA_VERSION,
        "kind": "latency",
        "key": key_of(arm, settings),
        "name": f"{label}, run {run}",
        **arm,
        "dataset": "mnist",
        "bundle": "mnist",
        "workers": 11,
        "k": 10,
        "wait_ms": wait_ms,
        "service_ms": 42.0,
        "requests": count,
        "settings": settings,
        "machine": MACHINE,
        "cores": 2,
        **({} if error else figures),
        "error": error,
    }
