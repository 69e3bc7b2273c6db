"""The demonstration: shipped weights, shipped test images, every worker erased in turn."""

from __future__ import annotations

from collections.abc import Sequence

from codedinvnet.codes.build import scheme_for
from codedinvnet.data import sample_images
from codedinvnet.evaluation.accuracy import Evaluation, evaluate
from codedinvnet.models.bundle import load_bundle

GROUP_SIZES = (2, 4, 10)


def run_demo(names: Sequence[str], seed: int = 0) -> None:
    """Evaluate bundles on the shipped test images, and print a table."""
    rows = []
    for name in names:
        bundle, source = load_bundle(name), sample_images(name)
        for k in GROUP_SIZES:
            rows.append((name, evaluate(scheme_for(bundle, k), source, k=k, seed=seed)))
    print(table(rows))


def table(rows: Sequence[tuple[str, Evaluation]]) -> str:
    """Return the evaluations as a text table."""
    lines = [
        "Every worker erased in turn; accuracy in % of the shipped 1,000 test images, 5 groupings",
        f"{'bundle':<9}{'k':>3}  {'overhead':>8}  {'normal':>7}  {'recovered':>9}  "
        f"{'worst position':>14}  {'agreement':>9}",
    ]
    for name, e in rows:
        lines.append(
            f"{name:<9}{e.k:>3}  {100 / e.k:>7.0f}%  {100 * e.normal_accuracy:>7.1f}  "
            f"{100 * e.recovered_accuracy:>9.1f}  {100 * e.worst_position_accuracy:>14.1f}  "
            f"{100 * e.agreement:>9.1f}"
        )
    return "\n".join(lines)
