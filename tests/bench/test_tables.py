from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import pytest

from codedinvnet.bench import plots, tables
from codedinvnet.rows import append_row
from tests.bench.canned import row


def cells_of(columns: tuple[str, ...], table: list[tuple[str, ...]]) -> list[dict[str, str]]:
    return [dict(zip(columns, line, strict=True)) for line in table]


@pytest.fixture
def rows() -> list[dict[str, Any]]:
    return [
        row("coded-invnet", 0.93),
        row("parm", 0.50, seed=1),
        row("parm", 0.54, seed=2),
        row("parm", 0.40, base="resnet", seed=1),
        row("approxifer", 0.80, systematic=False),
        row("approxifer", 0.88, base="resnet", systematic=False),
        row("small-backup", 0.97),
        row("nercc", 0.0, error="RuntimeError: out of luck"),
    ]


def test_seeds_share_a_line_with_mean_and_spread(rows: list[dict[str, Any]]) -> None:
    table = cells_of(tables.COLUMNS, tables.figures_table(tables.lines_of(rows)))
    (parm,) = [c for c in table if (c["method"], c["base"]) == ("parm", "invertible")]
    assert parm["recovered"] == "52.00 ± 2.83"
    assert parm["seeds"] == "2"
    (ours,) = [c for c in table if c["method"] == "coded-invnet" and c["source"] == "measured"]
    assert ours["recovered"] == "93.00 ± 0.30"  # by a bootstrap
    assert ours["extra queries"] == "10 %"
    assert ours["nobody missing"] == ""
    assert not [c for c in table if c["method"] == "nercc"]


def test_codes_without_direct_answers_have_a_column_of_their_own(
    rows: list[dict[str, Any]],
) -> None:
    table = cells_of(tables.COLUMNS, tables.figures_table(tables.lines_of(rows)))
    found = {
        c["nobody missing"]
        for c in table
        if (c["method"], c["source"]) == ("approxifer", "measured")
    }
    assert found == {"90.00"}


def test_nobody_missing_is_left_out_where_workers_are_corrupt() -> None:
    lines = tables.lines_of([row("approxifer", 0.4, corrupt=1, systematic=False)])
    table = cells_of(tables.COLUMNS, tables.figures_table(lines))
    (line,) = [c for c in table if c["corrupt"] == "1"]
    assert (line["nobody missing"], line["recovered"]) == ("", "40.00 ± 0.30")


def test_how_much_was_answered_is_told_where_it_was_not_all() -> None:
    rows = [row("parm", 0.6, missing=2, answered=0.8, seed=1)]
    rows += [row("parm", 0.6, missing=2, answered=0.9, seed=2), row("small-backup", 0.9, missing=2)]
    table = cells_of(tables.COLUMNS, tables.figures_table(tables.lines_of(rows)))
    assert {c["method"]: c["answered"] for c in table if c["missing"] == "2"} == {
        "parm": "85.00",
        "small-backup": "",
    }


def test_published_figures_stand_in_the_same_table_and_say_so(rows: list[dict[str, Any]]) -> None:
    table = cells_of(tables.COLUMNS, tables.figures_table(tables.lines_of(rows)))
    published = [c for c in table if c["source"].startswith("published")]
    assert {(c["method"], c["data set"], c["recovered"]) for c in published} == {
        ("approxifer", "mnist", "87.2"),
        ("parm", "mnist", "59.2"),
        ("coded-invnet-paper", "(not named)", "85.9"),
        ("parm", "(not named)", "53.4"),
    }


def published_cells(lines: list[tables.Line]) -> dict[tuple[str, str], dict[str, str]]:
    table = tables.published_section(lines).split("\n\n")[0].splitlines()[2:]
    cells = [tuple(line.removeprefix("| ").removesuffix(" |").split(" | ")) for line in table]
    found = cells_of(tables.PUBLISHED_COLUMNS, cells)
    return {(c["method"], c["data set"]): c for c in found}


def test_every_published_figure_stands_beside_ours_with_both_base_models(
    rows: list[dict[str, Any]],
) -> None:
    cells = published_cells(tables.lines_of(rows))
    assert set(cells) == {
        ("approxifer", "mnist"),
        ("parm", "mnist"),
        ("coded-invnet-paper", "(not named); ours: mnist"),
        ("parm", "(not named); ours: mnist"),
    }
    assert list(cells["approxifer", "mnist"].values())[3:] == [
        *("99.0", "87.2", "95.00", "88.00", "+0.8"),  # the better of its bases
    ]
    parm = list(cells["parm", "(not named); ours: mnist"].values())
    assert parm[3:5] == ["", "53.4"]
    assert parm[7] == f"{float(parm[6]) - 53.4:+.1f}"


@pytest.mark.parametrize(
    ("label", "recovered", "told"),
    [
        ("parm", 0.543, ""),
        ("parm", 0.541, "- parm on mnist, k = 10 (-5.1): Base model and training are others"),
        ("approxifer", 0.93, "- approxifer on mnist, k = 10 (+5.8): not explained."),
    ],
)
def test_what_is_far_from_the_published_figure_is_explained(
    label: str, recovered: float, told: str
) -> None:
    found = tables.published_section(tables.lines_of([row(label, recovered)]))
    assert told in found
    assert ("Further off than 5 points" in found) == bool(told)


@pytest.mark.parametrize("recovered", [0.3, 0.54, 0.86])
def test_a_published_figure_of_a_data_set_that_is_not_named_says_what_is_assumed(
    recovered: float,
) -> None:
    rows = [row(label, recovered) for label in ("parm", "coded-invnet-paper")]
    found = tables.published_section(tables.lines_of(rows)).split(
        "does not name the data set:\n\n"
    )[1]
    paper, parm = found.splitlines()
    off = 100 * recovered - 85.9
    assert paper.startswith(f"- coded-invnet-paper on mnist, k = 10 ({off:+.1f}): That it is of ")
    assert "f and g of the shipped bundle, which were trained together with our E" in paper
    assert parm.startswith(f"- parm on mnist, k = 10 ({100 * recovered - 53.4:+.1f}): That it is ")
    assert "does not name" not in tables.published_section(tables.lines_of([row("none", 0.1)]))


def test_what_trained_with_one_seed_says_for_how_long() -> None:
    rows = [
        row("parm", 0.5, preparing_seconds=400.0),
        row("parm", 0.8, k=4, preparing_seconds=0.2),  # its part was there
        row("parm", 0.9, k=2, preparing_seconds=0.2) | {"training_seconds": 540.0},
        row("none", 0.1, base="resnet", preparing_seconds=700.0),
        row("approxifer", 0.8, base="resnet", systematic=False),
        row("small-backup", 0.9, seed=1, preparing_seconds=900.0),
        row("small-backup", 0.9, seed=2, preparing_seconds=900.0),
        row("small-backup", 0.9, missing=2),  # of the first seed alone, but it has two
        row("coded-invnet", 0.9, preparing_seconds=900.0),  # nothing was trained
    ]
    assert tables.single_seeds(tables.lines_of(rows)) == (
        "One seed each (training minutes in brackets): parm of the invertible base, k = 10 (7), "
        "parm of the invertible base, k = 4 (not timed), parm of the invertible base, k = 2 (9), "
        "the plain ResNet (12)."
    )
    rows[0]["settings"]["quick"] = True
    assert tables.single_seeds(tables.lines_of(rows[:1])) == ""
    assert tables.single_seeds(tables.lines_of(rows[5:])) == ""
    assert "One seed each " in tables.report(rows[1:])


def test_the_papers_encoder_trained_from_its_inversions_on() -> None:
    """Whichever is longer: a trial that was interrupted prepared for what was left alone."""
    for method, expected in (("coded-invnet-paper", 521.0), ("parm", 499.0)):
        one = row(method, 0.9, preparing_seconds=521.0) | {"training_seconds": 499.0}
        assert tables.training_seconds(one) == expected
    resumed = row("coded-invnet-paper", 0.9, preparing_seconds=3.0) | {"training_seconds": 499.0}
    assert tables.training_seconds(resumed) == 499.0


def test_margins_are_against_each_rivals_best_base(rows: list[dict[str, Any]]) -> None:
    table = cells_of(tables.MARGIN_COLUMNS, tables.margins_table(tables.lines_of(rows)))
    found = {c["rival"]: c for c in table}
    assert set(found) == {"parm", "approxifer", "small-backup"}
    assert found["parm"]["its best base"] == "invertible"
    assert found["approxifer"]["its best base"] == "resnet"
    assert found["approxifer"]["its recovered"] == "88.00"
    assert found["parm"]["ours is"] == "above"
    assert found["parm"]["p"] == "< 0.001"
    assert found["small-backup"]["ours is"] == "below"
    assert float(found["approxifer"]["margin, points"]) == pytest.approx(5, abs=1)
    assert found["small-backup"]["its best base"] == "invertible (alone measured)"
    # Of eleven workers one is lost: (10 · 0.95 + 0.93) / 11 of all answers are right.
    assert found["approxifer"]["ours, all answers"] == "94.82"
    assert found["parm"]["ours, all answers"] == ""
    alone = [line for line in rows if (line["label"], line["base"]) != ("parm", "resnet")]
    table = cells_of(tables.MARGIN_COLUMNS, tables.margins_table(tables.lines_of(alone)))
    (parm,) = [c for c in table if c["rival"] == "parm"]
    assert parm["its best base"] == "invertible (alone measured)"


@pytest.mark.parametrize(
    "changed",
    [
        {"grouping_seed": 1},
        {"patterns": 8},
        {"test_images": 990, "groups": 99},
        {"train_images": 10},
        {"weights": "second"},
    ],
)
def test_methods_are_compared_only_if_they_were_given_the_same(changed: dict[str, Any]) -> None:
    old = [row("coded-invnet", 0.93), row("parm", 0.5), row("parm", 0.6, dataset="fashion")]
    new = row("coded-invnet", 0.95, **changed)
    lines = tables.lines_of([*old, new])
    assert [(x.label, x.dataset) for x in lines] == [("parm", "fashion"), ("coded-invnet", "mnist")]
    assert lines[1].rows == (new,)
    assert tables.margins_table(lines) == []
    again = tables.lines_of([*old, new, row("parm", 0.7, **changed)])
    assert len(tables.margins_table(again)) == 1


def test_quick_rows_count_where_a_data_set_has_no_others() -> None:
    quick: dict[str, Any] = {"quick": True, "groups": 9, "test_images": 90}
    full = [row("coded-invnet", 0.93), row("parm", 0.5)]
    late = [row("parm", 0.1, **quick), row("coded-invnet", 0.8, dataset="fashion", **quick)]
    lines = tables.lines_of([*full, *late])
    assert {(x.label, x.dataset, x.mean("recovered")) for x in lines} == {
        ("coded-invnet", "mnist", 0.93),
        ("parm", "mnist", 0.5),
        ("coded-invnet", "fashion", 0.8),
    }
    assert tables.remarks(full) == "Measured on a machine."
    assert tables.remarks([row("parm", 0.5, dataset="cifar10")]).startswith("CIFAR-10 was trained")
    assert tables.remarks(late).startswith("This is the quick version: ")
    assert tables.remarks([*full, *late]).startswith("The figures of fashion are of the quick ")


def test_margins_are_differences_of_the_accuracies_beside_them() -> None:
    rows = [
        row("coded-invnet", 0.9, groupings=(0.95, 0.9, 0.85)),
        row("oracle", 0.97),
    ]
    (found,) = cells_of(tables.MARGIN_COLUMNS, tables.margins_table(tables.lines_of(rows)))
    assert (found["ours"], found["its recovered"]) == ("95.00", "97.00")  # of the first grouping
    assert found["margin, points"] == "-2.00"
    assert "for these trained weights alone" in tables.report(rows)
    assert "not corrected for the number of tests" in tables.report(rows)


def test_failures_of_older_settings_are_left_out_and_errors_stay_in_their_cell() -> None:
    failed = row("parm", 0.0, error="RuntimeError: a | b\n  and more", epochs=1)
    page = tables.report([row("coded-invnet", 0.9), failed])
    assert "| parm | invertible | 1 | RuntimeError: a \\| b and more |\n" in page
    assert "Failed" not in tables.report([failed, row("parm", 0.5, epochs=9)])
    assert "Failed" not in tables.report([failed, row("coded-invnet", 0.9, grouping_seed=1)])


def test_a_failed_trial_is_a_row_with_its_error(rows: list[dict[str, Any]]) -> None:
    page = tables.report(rows)
    assert "## Failed trials" in page
    assert "| mnist | 10 | 1 | 0 | nercc | invertible | 1 | RuntimeError: out of luck |" in page
    again = tables.report([*rows, row("nercc", 0.7, systematic=False)])
    assert "Failed trials" not in again


def test_files_are_made_from_the_rows_alone(rows: list[dict[str, Any]], tmp_path: Path) -> None:
    path = tmp_path / "accuracy.jsonl"
    assert tables.write(path) == plots.write(path) == []
    for one in [*rows, row("coded-invnet", 0.95, k=4), row("parm", 0.7, k=4, dataset="fashion")]:
        append_row(path, one)
    page, table = tables.write(path)
    assert page.read_text().startswith("# Accuracy of every method\n")
    assert page.read_text().endswith("Measured on a machine.\n")
    assert "\n## fashion\n" in page.read_text()
    with open(table, newline="") as file:
        read = list(csv.DictReader(file))
    assert list(read[0]) == list(tables.COLUMNS)
    assert {r["method"] for r in read} >= {"coded-invnet", "parm", "approxifer", "small-backup"}
    pictures = plots.write(path)
    assert [p.name for p in pictures] == [
        f"accuracy-{name}.png" for name in ("k", "unavailability", "confusion")
    ]
    assert all(p.read_bytes()[:4] == b"\x89PNG" for p in pictures)


def test_what_is_lost_is_a_share_of_the_true_class() -> None:
    (line,) = tables.lines_of([row("parm", 0.5)])
    assert plots._lost_shares(line).tolist() == [[0.0, 20.0], [10.0, 0.0]]


def test_overall_accuracy_charges_codes_without_direct_answers_for_whole_groups() -> None:
    (systematic,) = tables.lines_of([row("parm", 0.55)])
    (other,) = tables.lines_of([row("approxifer", 0.55, systematic=False)])
    assert plots.overall(systematic, 0.0) == pytest.approx(0.95)
    assert plots.overall(systematic, 0.05) == pytest.approx(0.95 * 0.95 + 0.05 * 0.55)
    assert plots.overall(other, 0.0) == pytest.approx(0.9)
    assert plots.overall(other, 0.05) == pytest.approx(0.45 * 0.9 + 0.55 * 0.55)
    with pytest.raises(ValueError, match=r"0\.\.1/11"):
        plots.overall(systematic, 0.1)
