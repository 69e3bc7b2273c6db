"""The tables of equal cost, from rows and from trainings of another seed."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from scipy import stats

from benchmarks import equal_cost
from benchmarks.equal_cost import half_width
from codedinvnet.rows import append_row
from tests.bench.canned import row

SPENT = {"embedding_macs": 90, "head_macs": 10, "reading_macs": 0}


def write(folder: Path, **seeds: tuple[float, ...]) -> None:
    """Write rows of k = 10 on MNIST, one for each seed, of methods by their names' letters."""
    labels = {
        "code": ("coded-invnet", "accuracy"),
        "backup": ("small-backup", "accuracy"),
        "dear": ("small-backup@1.4", "equal-cost"),
        "collage": ("collage", "equal-cost"),
    }
    for name, values in seeds.items():
        label, file = labels[name]
        for seed, value in enumerate(values, start=1):
            append_row(folder / f"{file}.jsonl", row(label, value, seed=seed))
    for base, normal in (("invertible", 0.95), ("resnet", 0.96)):
        found: dict[str, Any] = {**row("none", 0.1, base=base), "normal": normal}
        append_row(folder / "accuracy.jsonl", found)


def lines(text: str, *cells: str) -> list[list[str]]:
    """Return the cells of the lines that have these."""
    found = [line.strip("| ").split(" | ") for line in text.splitlines()]
    return [own for own in found if set(cells) <= set(own)]


def test_intervals_are_over_the_trainings(tmp_path: Path) -> None:
    write(tmp_path, code=(0.9,), backup=(0.91, 0.92, 0.93), collage=(0.8,))
    text = equal_cost.table(tmp_path)
    half = stats.t.ppf(0.975, 2) * 1.0 / math.sqrt(3)
    (backup,), (code,) = lines(text, "small-backup"), lines(text, "coded-invnet")
    assert backup[:2] == ["mnist", "1"]
    assert backup[-1] == f"92.00 ± {half:.2f} (3)"
    assert code[-1] == "90.00 (1)"
    assert lines(text, "collage")[0][-3:] == ["not measured", "not measured", "80.00 (1)"]
    assert not lines(text, "superposition")


def test_a_bundle_from_another_seed_is_a_training_too(tmp_path: Path) -> None:
    write(tmp_path, code=(0.9,))
    other = {"test_k10": {"recovered_accuracy": 0.92}}
    (tmp_path / "seed-mnist.json").write_text(json.dumps(other))
    costs = {f"encoder_macs_k{k}": 4 * k for k in equal_cost.SIZES}
    (tmp_path / "mnist.json").write_text(json.dumps({"info": SPENT | costs}))
    (code,) = lines(equal_cost.table(tmp_path), "coded-invnet")
    half = stats.t.ppf(0.975, 1) * 1.0
    assert code[1] == "0.98 / 1.06 / 1.30"
    assert code[-1] == f"91.00 ± {half:.2f} (2)"


@pytest.mark.parametrize(
    ("code", "dear", "margin", "pays"),
    [
        ((0.93, 0.931, 0.929), (0.90, 0.901, 0.899), "ahead", "25 % late answers"),
        ((0.90, 0.901, 0.899), (0.93, 0.931, 0.929), "behind", "nowhere"),
        ((0.90, 0.94, 0.92), (0.90, 0.93, 0.92), "open", "75 % late answers"),
    ],
)
def test_the_code_pays_where_its_gain_is_worth_its_f(
    tmp_path: Path, code: tuple[float, ...], dear: tuple[float, ...], margin: str, pays: str
) -> None:
    write(tmp_path, code=code, dear=dear)
    ((_, _, cheap, against, price, share),) = lines(equal_cost.margins(tmp_path), "mnist")
    assert cheap == "not measured"
    assert against.endswith(f"({margin})")
    assert (price, share) == ("1.00", pays)


def test_a_difference_has_welchs_interval() -> None:
    ours, theirs = (1.0, 2.0, 4.0), (0.5, 0.6)
    found = stats.ttest_ind(ours, theirs, equal_var=False).confidence_interval(0.95)
    assert half_width(ours, theirs) == pytest.approx((found.high - found.low) / 2)
    assert math.isnan(half_width(ours, (1.0,)))
    assert half_width((2.0, 2.0)) == 0


def test_quick_rows_and_other_bases_are_left_out(tmp_path: Path) -> None:
    append_row(tmp_path / "equal-cost.jsonl", row("collage", 0.5, base="resnet"))
    append_row(tmp_path / "equal-cost.jsonl", row("collage", 0.5, k=4, missing=2))
    append_row(tmp_path / "equal-cost.jsonl", {**row("collage", 0.5, error="no")})
    assert equal_cost.table(tmp_path) == equal_cost.margins(tmp_path) == ""
