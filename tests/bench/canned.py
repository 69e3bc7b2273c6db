"""A row of `bench accuracy` without the benchmark."""

from __future__ import annotations

from typing import Any

import torch

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
