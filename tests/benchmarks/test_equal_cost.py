"""The tables of equal cost, from rows and from trainings of another seed."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from scipy import stats

from benchmarks import equal_cost
from benchmarks.figures import RESULTS
from codedinvnet.codes.backup import backup_network, backup_width
from codedinvnet.codes.equal_cost import macs, served_macs
from codedinvnet.codes.registry import METHODS
from codedinvnet.evaluation.grid import append_row
from codedinvnet.models.bundle import load_bundle
from tests.evaluation.canned import row

AGAIN = {
    **{"dataset": "mnist", "split": "test", "evidence": "both", "parity": "encoder", "k": 10},
    **{"images": 1000, "groupings": 5, "seed": 0, "recovered_accuracy": 0.92},
}
"""What evaluating a training from another seed found, measured as the rows were."""
SECOND = {"training_seed": 2, "settings": {"name": "a-seed2", "seed": 2}}
"""What the file of such a training states of it."""


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
            append_row(folder / f"{file}.jsonl", row(label, value, seed=seed, groupings=5))
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
    (tmp_path / "seed-mnist.json").write_text(json.dumps(SECOND | {"test_k10": AGAIN}))
    (code,) = lines(equal_cost.table(tmp_path), "coded-invnet")
    half = stats.t.ppf(0.975, 1) * 1.0
    assert code[1] == "its own"
    assert code[-1] == f"91.00 ± {half:.2f} (2)"


@pytest.mark.parametrize(
    ("code", "dear", "margin", "pays"),
    [
        ((0.93, 0.931, 0.929), (0.90, 0.901, 0.899), "ahead", "25 % late answers, on one f"),
        ((0.90, 0.901, 0.899), (0.93, 0.931, 0.929), "behind", "nowhere, on one f"),
        ((0.90, 0.94, 0.92), (0.90, 0.93, 0.92), "open", "open"),
    ],
)
def test_the_code_pays_where_its_gain_is_worth_its_f(
    tmp_path: Path, code: tuple[float, ...], dear: tuple[float, ...], margin: str, pays: str
) -> None:
    write(tmp_path, code=code, dear=dear)
    ((_, _, cheap, against, price, share),) = lines(equal_cost.margins(tmp_path), "mnist")
    assert cheap == "not measured"
    verdict = margin if margin == "open" else f"{margin}, on one f"  # which the backups share
    assert f"({verdict})" in against
    assert (price, share) == ("1.00", pays)


def test_quick_rows_and_other_bases_are_left_out(tmp_path: Path) -> None:
    append_row(tmp_path / "equal-cost.jsonl", row("collage", 0.5, base="resnet"))
    append_row(tmp_path / "equal-cost.jsonl", row("collage", 0.5, k=4, missing=2))
    append_row(tmp_path / "equal-cost.jsonl", {**row("collage", 0.5, error="no")})
    assert equal_cost.table(tmp_path) == equal_cost.margins(tmp_path) == ""


@pytest.mark.parametrize(
    "other",
    [
        {"groupings": 1},
        {"images": 100},
        {"seed": 1},
        {"dataset": "fashion"},
        {"split": "validation"},
        {"evidence": "side"},
        {"parity": "pixel mean"},
        {"k": 4},
    ],
)
def test_another_seed_counts_if_it_was_measured_as_the_rows_were(
    tmp_path: Path, other: dict[str, Any]
) -> None:
    write(tmp_path, code=(0.9,))
    (tmp_path / "seed-mnist.json").write_text(json.dumps(SECOND | {"test_k10": AGAIN | other}))
    assert lines(equal_cost.table(tmp_path), "coded-invnet")[0][-1] == "90.00 (1)"


@pytest.mark.parametrize(("epochs", "trainings"), [(3, "(2)"), (4, "(1)")])
def test_a_training_with_other_settings_is_no_second_one(
    tmp_path: Path, epochs: int, trainings: str
) -> None:
    write(tmp_path, code=(0.9,))
    own = {"info": {"provenance": {"settings": {"name": "a", "seed": 1, "epochs": 3}}}}
    (tmp_path / "mnist.json").write_text(json.dumps(own))
    settings = {"name": "a-seed2", "seed": 2, "epochs": epochs}
    other = {"training_seed": 2, "settings": settings, "test_k10": AGAIN}
    (tmp_path / "seed-mnist.json").write_text(json.dumps(other))
    assert lines(equal_cost.table(tmp_path), "coded-invnet")[0][-1].endswith(trainings)


def test_rows_say_what_a_network_of_a_whole_width_spends() -> None:
    model = load_bundle("mnist").model
    network = backup_network(model, backup_width(model, 10)).eval()
    spent = 10 * macs(network, model) / served_macs(model)
    assert 0.8 < spent < 0.9  # of the 1 that it may
    results = equal_cost.Results(RESULTS)
    assert results.spent("mnist", "small-backup", 10) == spent
    assert results.spent("mnist", "small-backup@1.4", 10) == pytest.approx(1.21, abs=0.005)
    assert results.spent("mnist", "approxifer", 10) == pytest.approx(1, abs=0.005)


def test_a_row_says_what_its_method_spends(tmp_path: Path) -> None:
    """So a bundle need not ship."""
    counts = {"extra_macs": 165, "served_macs": 100}
    for label, own in (("coded-invnet", counts), ("small-backup", counts | {"extra_macs": 94})):
        found = row(label, 0.8, dataset="tiny-imagenet") | own
        append_row(tmp_path / "accuracy.jsonl", found | {"bundle": "runs/tiny/bundle"})
    append_row(tmp_path / "accuracy.jsonl", row("small-backup", 0.9) | counts)
    text = equal_cost.table(tmp_path)
    spends = {tuple(line[:3:2]): line[3] for line in lines(text, "small-backup")}
    assert spends["tiny-imagenet", "small-backup"] == "– / – / 0.94"
    assert spends["mnist", "small-backup"] == "– / – / 1.65"
    (margin,) = lines(equal_cost.margins(tmp_path), "tiny-imagenet")
    assert "1.65 against 0.94" in margin[2]


def test_a_method_of_ones_own_comes_last_with_what_it_spends(tmp_path: Path) -> None:
    counts = {"extra_macs": 130, "served_macs": 100}
    for label in ("replication", "mine", "small-backup", "small-backup@2"):
        append_row(tmp_path / "equal-cost.jsonl", row(label, 0.9) | counts)
    found = lines(equal_cost.table(tmp_path), "mnist")
    assert [line[1:3] for line in found] == [
        ["1", "small-backup"],
        ["–", "mine"],
        ["–", "small-backup@2"],
    ]
    assert found[1][3:] == ["– / – / 1.30", "not measured", "not measured", "90.00 (1)"]


def test_every_method_of_ours_has_a_group_or_is_left_out() -> None:
    grouped = {name for methods in equal_cost.GROUPS.values() for name in methods}
    assert {*METHODS} <= grouped | {*equal_cost.LEFT_OUT}
    assert not grouped & {*equal_cost.LEFT_OUT}


def test_whoever_keeps_the_resnet_has_a_backup_of_it(tmp_path: Path) -> None:
    """It decides where the code pays, as soon as it was measured: each training has its own."""
    code, backup = (0.93, 0.931, 0.929), (0.90, 0.901, 0.899)
    write(tmp_path, code=code, backup=backup, dear=backup)
    share = [lines(equal_cost.margins(tmp_path), "mnist")[0][-1]]

    def append(label: str, **place: Any) -> None:
        for seed, value in enumerate((0.92, 0.921, 0.919), start=1):
            append_row(tmp_path / "equal-cost.jsonl", row(label, value, seed=seed, **place))
        share.append(lines(equal_cost.margins(tmp_path), "mnist")[0][-1])

    append("small-backup", base="resnet")  # which may spend less than the code
    append("small-backup@1.4", base="resnet", k=4)
    append("small-backup@1.4", base="resnet")
    assert share == ["25 % late answers, on one f"] * 3 + ["50 % late answers"]


@pytest.mark.parametrize(("backup", "margin"), [(0.90, "+3.00"), (0.96, "-3.00")])
def test_one_training_of_each_settles_nothing(tmp_path: Path, backup: float, margin: str) -> None:
    write(tmp_path, code=(0.93,), backup=(backup,))
    (line,) = lines(equal_cost.margins(tmp_path), "mnist")
    assert line[2].startswith(f"{margin} (each trained once)")
    assert line[-1] == "open"


def test_a_cheap_backup_that_is_ahead_settles_it(tmp_path: Path) -> None:
    """Whatever the dear one's only training says."""
    write(tmp_path, code=(0.90, 0.901), backup=(0.93, 0.931), dear=(0.89,))
    (line,) = lines(equal_cost.margins(tmp_path), "mnist")
    assert line[-1] == "nowhere, on one f"
