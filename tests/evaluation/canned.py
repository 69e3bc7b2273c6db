"""Rows of `bench accuracy` and `bench latency` without the benchmarks."""

from __future__ import annotations

from typing import Any

import numpy as np

from codedinvnet.codes.registry import known_method
from codedinvnet.common.grid import Cell
from codedinvnet.evaluation.client import Reply
from codedinvnet.evaluation.service import latency_figures
from codedinvnet.models.bundle import shipped_bundles, weights_digest

K = 10
MACHINE = "a machine"


def row(
    label: str,
    recovered: float,
    *,
    dataset: str = "mnist",
    base: str = "invertible",
    k: int = K,
    missing: int = 1,
    corrupt: int = 0,
    seed: int = 1,
    error: str | None = None,
    systematic: bool = True,
    answered: float = 1.0,
    epochs: int = 1,
    weights: str | None = None,
    **shared: Any,
) -> dict[str, Any]:
    """Return a row of `bench accuracy`.

    Args:
        weights: the bundle's; None: those that ship.
        shared: settings, and others.
    """
    if weights is None:
        weights = weights_digest(dataset) if dataset in shipped_bundles() else "first"
    trial = {"label": label, "method": label, "dataset": dataset, "base": base, "k": k}
    trial |= {"missing": missing, "corrupt": corrupt, "seed": seed, "bundle": dataset}
    settings: dict[str, Any] = {"quick": False, "grouping_seed": 0, "patterns": 64}
    settings |= {"test_images": 1000, "train_images": 1000, "bundle": weights, "epochs": epochs}
    method = known_method(label)
    settings |= {**(method.versions() if method else {}), **shared}
    figures: dict[str, Any] = {
        "normal": 0.95,
        "complete": 0.95 if systematic else 0.9,
        "recovered": recovered,
        "answered": answered,
        "systematic": systematic,
        "r": 1,
    }
    return made("accuracy", trial, settings, {} if error else figures, error)


def made(
    experiment: str,
    place: dict[str, Any],
    settings: dict[str, Any],
    figures: dict[str, Any],
    error: str | None,
) -> dict[str, Any]:
    """Return the row of a cell."""
    cell = Cell(experiment, place, settings, lambda: figures)
    return {**cell.row(), "machine": MACHINE, "commit": "0123456789abcdef", "error": error}


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
    decoded: float = 0.02,
    work: float = 1.11,
    error: str | None = None,
    stragglers: str = "pareto",
    load: float = 0.4,
    quick: bool = False,
    wait_ms: float = 40.0,
    batch: int = 10,
    held_ms: float = 100.0,
    machine: str = MACHINE,
    cores: int = 2,
) -> dict[str, Any]:
    """Return a row of `bench latency` whose requests took so long, and some of which were lost."""
    arm = {"label": label, "batch": batch, "load": load, "straggler_model": stragglers, "run": run}
    settings: dict[str, Any] = {"quick": quick, "wait_ms": wait_ms}
    if label == "small-backup":
        settings |= {"backup": {"epochs": 1}, "parity_wait_ms": [0.0, wait_ms / 10]}
    elif "coded" in label.split("+"):
        settings["parity_wait_ms"] = [wait_ms, 1.604]
    count = len(milliseconds) + lost
    figures: dict[str, Any] = {
        **latency_figures(replies(milliseconds, lost)),
        "queries": batch * count,
        "errors": lost,
        "missing_share": round(lost / count, 6),
        "decoded_share": decoded,
        "accuracy": accuracy,
        "work_per_query": work,
    }
    arm["dataset"] = "mnist"
    settings["stragglers"] = [{"kind": "hold", "delay": {"ms": held_ms}}]
    figures |= {"name": f"{label}, run {run}", "bundle": "mnist", "workers": 11, "k": 10}
    figures |= {
        "requests": count,
        "seed": run,
        "stragglers": settings["stragglers"],
        "cores": cores,
    }
    found = made("latency", arm, settings, {} if error else figures, error)
    return {**found, "machine": machine}
