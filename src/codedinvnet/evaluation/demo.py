"""The demonstration: shipped weights, shipped test images, every worker erased in turn."""

from __future__ import annotations

from collections.abc import Sequence

from codedinvnet.codes.build import scheme_for
from codedinvnet.data import sample_images
from codedinvnet.evaluation.accuracy import evaluate
from codedinvnet.models.bundle import load_bundle

GROUP_SIZES = (2, 4, 10)
COLUMNS = ("normal", "recovered", "worst position", "agreement")


def run_demo(names: Sequence[str], seed: int = 0) -> None:
    """Evaluate bundles on the shipped test images, and print a table."""
    print("Every worker erased in turn; % of the shipped 1,000 test images, 5 groupings")
    print(f"{'bundle':<9}{'k':>3}{'overhead':>10}" + "".join(f"{name:>16}" for name in COLUMNS))
    for name in names:
        bundle, source = load_bundle(name), sample_images(name)
        for k in GROUP_SIZES:
            e = evaluate(scheme_for(bundle, k), source, k=k, seed=seed)
            shares = (
                *(e.normal_accuracy, e.recovered_accuracy),
                *(e.worst_position_accuracy, e.agreement),
            )
            cells = "".join(f"{100 * share:>16.1f}" for share in shares)
            print(f"{name:<9}{k:>3}{100 / k:>9.0f}%{cells}")
