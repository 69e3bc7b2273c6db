"""What `python -m benchmarks.figures` writes, and that the pages are as the rows beside them."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
from matplotlib.patches import Rectangle

from benchmarks import bundles, equal_cost, figures, policies
from benchmarks.bundles import BUNDLES, SIZES
from benchmarks.figures import FROM_FILE, FROM_FOLDER, RESULTS, pages, render, section
from codedinvnet.errors import UserError
from codedinvnet.models.bundle import Bundle, shipped_bundles, weights_digest
from codedinvnet.rows import append_row
from codedinvnet.simulation import sweep
from tests.evaluation.canned import row


def rows_of(table: str) -> list[dict[str, str]]:
    head, _, *body = (line[2:-2].split(" | ") for line in table.splitlines())
    return [dict(zip(head, one, strict=True)) for one in body]


def test_the_pages_are_of_the_rows_beside_them() -> None:
    """And every table that was measured has a place in one of them."""
    marked = set()
    for path in pages():
        text = path.read_text(encoding="utf-8")
        assert render(text) == text, path.name
        marked |= {found[2] for found in figures.MARKED.finditer(text)}
    for name in {*FROM_FOLDER, *FROM_FILE} - marked:
        assert section(name).startswith("Not measured yet"), name
    for picture in (
        "accuracy-late",
        "map",
        "policies-tail",
        "policies-work",
    ):
        assert (RESULTS / f"{picture}.png").is_file()


def test_no_row_names_a_folder_of_the_machine_that_made_it() -> None:
    for path in RESULTS.rglob("*.json*"):
        assert not re.search(r'(?:"| |=)/[a-z]\w*/', path.read_text()), path


def test_what_was_not_measured_says_which_command_does_it(tmp_path: Path) -> None:
    for name in ("late", "latency", "validation", "auto", "ablation"):
        told = section(name, tmp_path)
        assert told.startswith("Not measured yet; `")
        assert FROM_FILE[name][0] in told
    assert "benchmarks.figures" in section("bundles", tmp_path)
    assert "-test_fusion" in section("paper", tmp_path)
    grids = {"choice": "simulate-policies", "equal-cost": "accuracy", "equal-margins": "accuracy"}
    for name, grid in grids.items():
        assert f"configs/bench/{grid}.json" in section(name, tmp_path)
    append_row(tmp_path / "accuracy.jsonl", row("none", 0.1))
    assert "configs/bench/equal-cost.json" in section("equal-cost", tmp_path)


def test_only_what_stands_between_marks_is_replaced() -> None:
    text = "a\n<!-- figures:late -->\nold\n<!-- end -->\nb\n<!-- end -->\n"
    new = render(text, lambda name: f"new {name}")
    assert new == "a\n<!-- figures:late -->\nnew late\n<!-- end -->\nb\n<!-- end -->\n"
    with pytest.raises(UserError, match="there is no table 'early'"):
        render(text.replace("late", "early"))


@pytest.mark.parametrize("name", shipped_bundles())
def test_what_was_measured_of_a_bundle_is_of_the_weights_that_ship(name: str) -> None:
    assert json.loads((RESULTS / f"{name}.json").read_text())["weights"] == weights_digest(name)


def test_a_bundles_lines_have_the_other_seed_and_the_papers_objective(tmp_path: Path) -> None:
    shutil.copy(RESULTS / "mnist.json", tmp_path)
    own = json.loads((RESULTS / "mnist.json").read_text())["info"]["provenance"]["settings"]
    again = {"settings": {**own, "seed": 2}, "test_k4": {"recovered_accuracy": 0.98}}
    (tmp_path / "seed-mnist.json").write_text(json.dumps(again))
    append_row(tmp_path / "accuracy.jsonl", row("coded-invnet-paper", 0.7))
    append_row(tmp_path / "accuracy.jsonl", row("coded-invnet-paper", 0, k=4, error="No: luck"))
    lines = {line["k"]: line for line in rows_of(section("bundles", tmp_path))}
    assert [lines[k]["paper's objective"] for k in ("2", "4", "10")] == ["", "failed", "70.00"]
    assert [lines[k]["another seed"] for k in ("2", "4", "10")] == ["", "98.00", ""]


def test_what_a_bundles_file_lacks_is_not_measured(tmp_path: Path) -> None:
    found = json.loads((RESULTS / "mnist.json").read_text())
    found["info"]["encoder_macs_k10"] = None
    (tmp_path / "mnist.json").write_text(json.dumps({"info": found["info"]}))
    lines = {line[""]: line["mnist"] for line in rows_of(section("costs", tmp_path))}
    assert lines["encoder E, ten images"] == "not measured"
    assert lines["fixed-point iterations, mean"] == "not measured"
    assert lines["embedding f, one image"].endswith(" M")
    assert section("bundles", tmp_path).startswith("Not measured yet")


def test_a_bundles_extra_work_is_that_of_the_table_of_equal_cost() -> None:
    """Both are counted in queries of g(f(x))."""
    lines = rows_of(section("bundles"))
    shares = [float(line["extra multiply-adds"].rstrip("%")) / 100 for line in lines]
    results = equal_cost.Results(RESULTS)
    expected = [results.spent(name, "coded-invnet", k) / k for name in BUNDLES for k in SIZES]
    assert shares == pytest.approx(expected, abs=0.0051)  # of a hundredth


def test_a_short_table_leaves_out_what_failed_and_what_nobody_measured(tmp_path: Path) -> None:
    path = tmp_path / "accuracy.jsonl"
    for one in (
        row("coded-invnet", 0.9),
        row("coded-invnet", 0.8, dataset="cifar10"),
        row("approxifer", 0.7, systematic=False),
        row("nercc", 0.5),
        row("nercc", 0.5, dataset="cifar10", error="no luck"),
        row("parm", 0.4, k=4),
    ):
        append_row(path, one)
    lines = rows_of(section("late", tmp_path))
    late = {line["answer, % right"]: (line["mnist"], line["cifar10"]) for line in lines}
    assert late == {
        "direct, f": ("95.00", "95.00"),
        "coded-invnet": ("90.00", "80.00"),
        "approxifer": ("70.00", ""),
        "nercc": ("50.00", ""),
    }
    workers = {line["answer, % right"]: line["extra workers"] for line in lines}
    assert workers == dict.fromkeys(late, "1") | {"direct, f": "none"}


def test_a_set_whose_bundle_does_not_ship_has_its_tables_as_rows_come_in(tmp_path: Path) -> None:
    path = tmp_path / "accuracy.jsonl"
    for one in (row("coded-invnet", 0.9), row("collage", 0.8)):
        append_row(path, one)
    assert section("accuracy-tiny-imagenet", tmp_path).startswith("Not measured yet")
    append_row(path, row("small-backup", 0.6, dataset="tiny-imagenet"))
    (own,) = rows_of(section("accuracy-tiny-imagenet", tmp_path))
    assert (own["method"], own["recovered"]) == ("small-backup", "60.00")
    late = {line["answer, % right"]: line for line in rows_of(section("late", tmp_path))}
    assert list(late) == ["direct, f", "coded-invnet", "small-backup"]  # collage: at equal cost
    assert late["direct, f"]["tiny-imagenet"] == "95.00"
    assert late["coded-invnet"]["tiny-imagenet"] == late["small-backup"]["mnist"] == ""
    assert late["small-backup"]["tiny-imagenet"] == "60.00"


def test_a_short_table_has_direct_answers_of_the_plain_network(tmp_path: Path) -> None:
    for one in (row("coded-invnet", 0.9), {**row("none", 0.1, base="resnet"), "normal": 0.97}):
        append_row(tmp_path / "accuracy.jsonl", one)
    late = {line["answer, % right"]: line["mnist"] for line in rows_of(section("late", tmp_path))}
    assert late["direct, f"] == "95.00"
    assert late["direct, plain ResNet"] == "97.00"


def write_policies(folder: Path) -> None:
    """Write rows of the policies to choose from, with p99.9 of 100 ms but for `uncoded`."""
    for batch, late in ((1, 200.0), (10, 50.0)):  # of `uncoded`, twice and half the others' 100
        for policy in ("uncoded", *policies.CHOICE):
            cell = {"stragglers": "pareto", "batch": batch, "load": 0.4, "policy": policy}
            work = 1.0 if policy == "uncoded" else 1.1 + batch / 100
            figures = {"p999_ms": late if policy == "uncoded" else 100.0, "p999_ms_95": None}
            figures["decoded_share"] = 0.09 * batch if policy == "small-backup" else 0.0
            append_row(
                folder / "policies.jsonl",
                {"schema_version": 1, "cell": cell, "scenario": {}, "work_per_query": work}
                | figures,
            )


def test_the_table_to_choose_by_compares_with_no_redundancy(tmp_path: Path) -> None:
    write_policies(tmp_path)
    for one in (row("coded-invnet", 0.9), row("small-backup", 0.8), row("small-backup", 0.1, k=4)):
        append_row(tmp_path / "accuracy.jsonl", one)
    lines = {line["policy"]: line for line in rows_of(section("choice", tmp_path))}
    assert list(lines) == [f"`{policy}`" for policy in policies.CHOICE]
    for line in lines.values():
        assert line["p99.9, without = 1"] == "1.00 (0.50 to 2.00)"
        assert line["extra work, %"] == "11.0 to 20.0"
        backup = line["policy"] == "`small-backup`"
        assert line["approximate answers, %"] == ("9.0 to 90.0" if backup else "none")
    right, direct, trained = ([line[name] for line in lines.values()] for name in list(line)[4:])
    assert right == ["80.0", "95.0", "80.0", "80.0", "90.0"]
    assert direct == ["95.0"] * 5
    assert trained[1] == "nothing"
    assert trained[4] == "f, g and E"


def test_the_table_to_choose_by_has_the_best_base_of_each_policy(tmp_path: Path) -> None:
    """Of the image sets whose bundles ship, as far as they were measured."""
    write_policies(tmp_path)
    for one in (
        *(row("coded-invnet", 0.9), row("small-backup", 0.8)),
        row("small-backup", 0.82, base="resnet"),
        {**row("none", 0.1, base="resnet"), "normal": 0.97},
        row("small-backup", 0.7, dataset="fashion"),
        row("coded-invnet", 0.6, dataset="tiny-imagenet"),
    ):
        append_row(tmp_path / "accuracy.jsonl", one)
    column = "late answers right, %: mnist, fashion"
    right = {line["policy"]: line[column] for line in rows_of(section("choice", tmp_path))}
    assert right["`hedge`"] == "97.0, 95.0"
    assert right["`auto`"] == "82.0, 70.0"
    assert right["`coded`"] == "90.0, –"
    direct = {
        line["policy"]: line["direct answers right, %"]
        for line in rows_of(section("choice", tmp_path))
    }
    assert direct["`hedge`"] == "97.0, 95.0"
    assert direct["`coded`"] == "95.0, –"  # of the base that its late answers are of


def test_the_best_base_is_that_on_which_most_answers_are_right(tmp_path: Path) -> None:
    """Few answers are approximate, but for those of the small backup: nine of ten."""
    write_policies(tmp_path)
    plain = {**row("small-backup", 0.7, base="resnet"), "normal": 0.97}
    for one in (row("small-backup", 0.8), plain):
        append_row(tmp_path / "accuracy.jsonl", one)
    lines = {line["policy"]: line for line in rows_of(section("choice", tmp_path))}
    for policy, late, direct in (("auto", "70.0", "97.0"), ("small-backup", "80.0", "95.0")):
        line = lines[f"`{policy}`"]
        assert line["late answers right, %: mnist"] == late
        assert line["direct answers right, %"] == direct


def test_the_table_of_places_has_what_all_places_cost(tmp_path: Path) -> None:
    shared: dict[str, Any] = {
        "schema_version": 1,
        "scenario": {},
        "p999_ms": 100.0,
        "p999_ms_95": [90.0, 110.0],
    }
    for policy, shares in (("hedge", (0.0, 0.0)), ("auto", (0.0184, 0.0056))):
        for batch, share in zip((10, 1), shares, strict=True):
            cell = {"stragglers": "pareto", "batch": batch, "load": 0.4, "policy": policy}
            costs = {"work_per_query": 1 + batch / 100, "decoded_share": share}
            append_row(tmp_path / "policies.jsonl", {"cell": cell, **shared, **costs})
    hedge, auto = rows_of(section("policies", tmp_path))
    assert hedge["pareto, 10"] == auto["pareto, 1"] == "100 (90–110)"
    assert hedge["work"] == auto["work"] == "1.01 to 1.10"
    assert hedge["approximate answers, %"] == "none"
    assert auto["approximate answers, %"] == "0.6 to 1.8"


def test_every_bar_and_its_label_are_those_of_the_policy_at_their_height() -> None:
    """Compared with the rows, so that no label is swapped, or lies over another."""
    rows = [json.loads(line) for line in (RESULTS / "policies.jsonl").read_text().splitlines()]
    here = [
        row for row in rows if (row["cell"]["stragglers"], row["cell"]["batch"]) == ("pareto", 10)
    ]
    here[0] |= {"p999_ms": None, "p999_ms_95": None}
    late = {row["cell"]["policy"]: row["p999_ms"] for row in here}
    frame = sweep.frame_of(rows)
    extra = {
        name: abs(round(100 * (own.mean() - 1), 1)) for name, own in frame.groupby("policy")["work"]
    }
    never = "too many were lost"
    tail, work = policies.tail(frame), policies.work(frame)
    work.draw_without_rendering()
    names = [text.get_text() for text in work.axes[0].get_yticklabels()]
    for figure, axis, own, lengths, texts in (
        (
            tail,
            tail.axes[0],
            None,
            late,
            {n: f"{ms:.0f}" if ms else never for n, ms in late.items()},
        ),
        (work, work.axes[1], names, extra, {n: f"{share:.1f} %" for n, share in extra.items()}),
    ):
        figure.draw_without_rendering()
        shown = own or [text.get_text() for text in axis.get_yticklabels()]
        labels = {round(text.get_position()[1], 6): text for text in axis.texts}
        bars = {
            round(bar.get_y() + bar.get_height() / 2, 6): bar
            for bar in axis.patches
            if isinstance(bar, Rectangle)
        }
        assert sorted(shown) == sorted(lengths)
        for name, height in zip(shown, axis.get_yticks(), strict=True):
            assert labels[height].get_text() == texts[name]
            assert bars[height].get_width() == pytest.approx(lengths[name] or 0.0)
        boxes = [text.get_window_extent() for text in axis.texts]
        assert not any(box.count_overlaps(boxes[:place]) for place, box in enumerate(boxes))


@pytest.fixture
def repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A repository with one page and the rows of one bundle."""
    results = tmp_path / "docs" / "results"
    results.mkdir(parents=True)
    shutil.copy(RESULTS / "mnist.json", results)
    (tmp_path / "README.md").write_text("<!-- figures:costs -->\n<!-- end -->\n")
    monkeypatch.setattr(figures, "ROOT", tmp_path)
    monkeypatch.setattr(figures, "RESULTS", results)
    monkeypatch.setattr(figures.section, "__defaults__", (results,))
    monkeypatch.setattr(figures.draw, "__defaults__", (results,))
    return tmp_path


def test_the_command_measures_a_bundle_and_writes_the_pages(
    repository: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def evaluated(bundle: Bundle, source: Any, *, k: int, **_: Any) -> dict[str, Any]:
        return {"k": k}

    monkeypatch.setattr(bundles, "evaluation_images", lambda *_: [0])
    monkeypatch.setattr(bundles, "evaluation_report", evaluated)
    monkeypatch.setattr(bundles, "inversion_report", lambda *_: {"largest_error": 0.5})
    monkeypatch.setattr(bundles, "info_report", lambda *_: {"embedding_ms": 7.0})
    assert figures.main(["mnist", "--data-dir", "data"]) == 0
    found = json.loads((repository / "docs" / "results" / "mnist.json").read_text())
    assert [report["k"] for report in found["latent"]] == list(SIZES)
    assert found["pixel_mean"] == {"k": 10}
    assert found["weights"] == weights_digest("mnist")
    text = (repository / "README.md").read_text()
    assert "| embedding f, time | 7.0 ms |" in text
    assert "| largest inversion error (pixels in 0..1) | 5.0e-01 |" in text


def test_a_mistake_is_one_line(
    repository: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert figures.main(["mnits", "--measure"]) == 2
    assert capsys.readouterr().err.startswith("error: no bundle mnits ships; these do: ")
    before = (repository / "README.md").read_text()
    (repository / "docs" / "results" / "mnist.json").write_text("{")
    assert figures.main([]) == 2
    assert "mnist.json is not JSON" in capsys.readouterr().err
    assert (repository / "README.md").read_text() == before
