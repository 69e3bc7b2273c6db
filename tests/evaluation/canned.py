"""Rows of `bench accuracy` without the benchmark."""

from __future__ import annotations

from typing import Any

from codedinvnet.codes.registry import known_method
from codedinvnet.common.grid import Cell
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
    trial |= {"missing": missing, "seed": seed, "bundle": dataset}
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


def cells(table: str) -> list[dict[str, str]]:
    """Return the lines of a Markdown table, by column."""
    head, _, *body = (line[2:-2].split(" | ") for line in table.splitlines())
    return [dict(zip(head, one, strict=True)) for one in body]


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
