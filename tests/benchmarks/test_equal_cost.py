"""The tables of equal cost, from rows and from trainings of another seed."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from scipy import stats

from benchmarks import equal_cost
from codedinvnet.common.grid import append_row
from tests.evaluation.canned import row


def write(folder: Path, **seeds: tuple[float, ...]) -> None:
    """Write rows of k = 10 on MNIST, one for each seed, of methods by their names' letters."""
    labels = {
        "code": ("coded-invnet", "accuracy"),
        "backup": ("small-backup", "accuracy"),
        "dear": ("small-backup@1.4", "equal-cost"),
    }
    for name, values in seeds.items():
        label, file = labels[name]
        for seed, value in enumerate(values, start=1):
            append_row(folder / f"{file}.jsonl", row(label, value, seed=seed, groupings=5))
    for base, normal in (("invertible", 0.95), ("resnet", 0.96)):
        found: dict[str, Any] = {**row("none", 0.1, base=base), "normal": normal}
        append_row(folder / "accuracy.jsonl", found)


def lines(text: str, *cells: str) -> list[list[str]]:
    """Return the cells of the lines that have these."""
    found = [line.strip("| ").split(" | ") for line in text.splitlines()]
    return [own for own in found if set(cells) <= set(own)]


def test_intervals_are_over_the_trainings_and_another_seed_is_one(tmp_path: Path) -> None:
    write(tmp_path, code=(0.9,), backup=(0.91, 0.92, 0.93))
    text = equal_cost.table(tmp_path)
    half = stats.t.ppf(0.975, 2) * 1.0 / math.sqrt(3)
    (backup,), (code,) = lines(text, "small-backup"), lines(text, "coded-invnet")
    assert (backup[0], backup[-1]) == ("mnist", f"92.00 ± {half:.2f} (3)")
    assert code[-1] == "90.00 (1)"
    assert code[-3:-1] == ["not measured", "not measured"]
    again = {"test_k10": {"recovered_accuracy": 0.92}}
    (tmp_path / "seed-mnist.json").write_text(json.dumps(again))
    (code,) = lines(equal_cost.table(tmp_path), "coded-invnet")
    assert code[-1] == f"91.00 ± {stats.t.ppf(0.975, 1):.2f} (2)"


def test_margins_have_an_interval_if_both_were_trained_again(tmp_path: Path) -> None:
    write(tmp_path, code=(0.93, 0.931, 0.929), backup=(0.90,), dear=(0.95, 0.951, 0.949))
    ((_, k, cheap, dear, price),) = lines(equal_cost.margins(tmp_path), "mnist")
    half = stats.t.ppf(0.975, 4) * 0.1 * math.sqrt(2 / 3)
    assert (k, cheap, dear, price) == ("10", "+3.00", f"-2.00 ± {half:.2f}", "1.00")


def test_failed_rows_and_other_patterns_and_bases_are_left_out(tmp_path: Path) -> None:
    append_row(tmp_path / "equal-cost.jsonl", row("small-backup@1.4", 0.5, base="resnet"))
    append_row(tmp_path / "equal-cost.jsonl", row("small-backup@1.4", 0.5, k=4, missing=2))
    append_row(tmp_path / "equal-cost.jsonl", {**row("small-backup@1.4", 0.5, error="no")})
    assert equal_cost.table(tmp_path) == equal_cost.margins(tmp_path) == ""


def test_a_row_says_what_its_method_spends_and_ones_own_methods_come_last(tmp_path: Path) -> None:
    counts = {"extra_macs": 130, "served_macs": 100}
    for label in ("replication", "mine", "small-backup", "small-backup@2"):
        append_row(tmp_path / "equal-cost.jsonl", row(label, 0.9) | counts)
    found = lines(equal_cost.table(tmp_path), "mnist")
    assert [line[1] for line in found] == ["small-backup", "mine", "small-backup@2"]
    assert found[1][2:] == ["– / – / 1.30", "not measured", "not measured", "90.00 (1)"]
