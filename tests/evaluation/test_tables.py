from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from codedinvnet.common.grid import append_row
from codedinvnet.common.quantiles import clustered_ci
from codedinvnet.evaluation import tables
from tests.evaluation.canned import cells, row


def line(frame: pd.DataFrame, **place: Any) -> Any:
    kept = frame
    for name, value in place.items():
        kept = kept[kept[name] == value]
    assert len(kept) == 1
    return kept.iloc[0]


ACCURACY = [
    row("coded-invnet", 0.93),
    *(row("parm", share, seed=seed) for seed, share in enumerate((0.50, 0.54, 0.52), start=1)),
    row("parm", 0.40, base="resnet", seed=1),
    row("approxifer", 0.80, systematic=False),
    row("approxifer", 0.88, base="resnet", systematic=False),
    row("small-backup", 0.97),
    row("mine", 0.6, missing=2, answered=0.8),
    row("nercc", 0.0, error="RuntimeError: out | of\nluck"),
]


def test_seeds_are_one_line_with_half_of_a_95_percent_interval() -> None:
    frame = tables.accuracy_frame(ACCURACY)
    parm = line(frame, method="parm", base="invertible")
    assert parm["recovered"] == pytest.approx(52)
    assert parm["recovered ±"] == pytest.approx(clustered_ci([50.0, 54.0, 52.0]))
    assert (parm["seeds"], parm["extra"]) == (3, 10)
    assert math.isnan(line(frame, method="coded-invnet")["recovered ±"])  # one seed
    shown = {(c["method"], c["base"]): c for c in cells(tables.accuracy_table(frame))}
    assert shown["parm", "invertible"]["recovered"] == "52.00 ± 4.97"
    assert "nercc" not in set(frame["method"])


def test_a_bundle_by_another_path_is_no_further_training() -> None:
    rows = [row("parm", 0.5 + seed / 50, base="resnet", seed=seed) for seed in (1, 2, 3)]
    again = [{**own, "bundle": "/elsewhere", "key": f"again {own['seed']}"} for own in rows]
    for order in (rows + again, again + rows):
        (found,) = tables.accuracy_frame(order).to_dict("records")
        assert (found["seeds"], found["recovered"]) == (3, pytest.approx(54))
        assert found["recovered ±"] == pytest.approx(clustered_ci([52.0, 54.0, 56.0]))


def test_what_no_training_changes_has_no_interval() -> None:
    """The direct answers of f, and which answers there are; each seed has a plain ResNet."""
    rows = [
        {**row("mine", 0.5, base=base, seed=seed, answered=0.9), "normal": normal}
        for base, all_normal in (("invertible", (0.95, 0.95, 0.95)), ("resnet", (0.91, 0.92, 0.93)))
        for seed, normal in enumerate(all_normal, start=1)
    ]
    frame = tables.accuracy_frame(rows)
    shown = {cell["base"]: cell for cell in cells(tables.accuracy_table(frame))}
    assert shown["invertible"]["normal"] == "95.00"
    assert shown["resnet"]["normal"] == "92.00 ± 2.48"
    assert [cell["answered"] for cell in shown.values()] == ["90.00"] * 2
    assert shown["invertible"]["recovered"] == "50.00 ± 0.00"


def test_tables_tell_what_extra_workers_spend(tmp_path: Path) -> None:
    """In queries of the served model, as the newest row has it that does: older ones do not."""
    out = tmp_path / "rows.jsonl"
    counts = [{"extra_macs": 100}, {"extra_macs": 350}, {}]
    for seed, own in enumerate(counts, start=1):
        append_row(out, row("mine", 0.5, seed=seed) | (own and own | {"served_macs": 200}))
    append_row(out, row("older", 0.5))
    page, table = tables.write_accuracy(out)
    shown = cells(page.read_text().partition("\n\n")[2])
    assert {cell["method"]: cell["spends"] for cell in shown} == {"mine": "1.75", "older": ""}
    assert line(pd.read_csv(table), method="mine")["spends"] == 1.75


def test_failures_are_a_table_of_their_own(tmp_path: Path) -> None:
    out = tmp_path / "rows.jsonl"
    for one in ACCURACY:
        append_row(out, one)
    page, table = tables.write_accuracy(out)
    assert page.read_text().count("| RuntimeError: out \\| of luck |") == 1
    found = pd.read_csv(table)
    assert len(found) == len(tables.accuracy_frame(ACCURACY))
