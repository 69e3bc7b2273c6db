"""What `python -m benchmarks figures` writes, and that the pages are as the rows beside them."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest

from benchmarks import figures, sweep
from benchmarks.figures import RESULTS, ROOT, TABLES, fresh, pages, render, section
from benchmarks.stale import simulated_digest
from codedinvnet.common.errors import UserError
from codedinvnet.common.grid import append_row
from codedinvnet.evaluation import tables
from codedinvnet.models.bundle import shipped_bundles, weights_digest
from tests.evaluation.canned import cells, row


def test_the_pages_are_of_the_rows_beside_them() -> None:
    """And every table that was measured has a place in one of them.

    Whether rows are stale is said by `make bench-page`, because any change of the scheduler makes
    them so.
    """
    marked = set()
    for path in pages():
        text = path.read_text(encoding="utf-8")
        assert fresh(render(text)) == fresh(text), path.name
        marked |= {found[2] for found in figures.MARKED.finditer(text)}
    for name in {*TABLES} - marked:
        assert section(name).startswith("Not measured yet"), name
    assert tables.SHIPPED.read_text() == figures.shipped()


def test_no_row_names_a_folder_of_the_machine_that_made_it() -> None:
    for path in RESULTS.rglob("*.json*"):
        assert not re.search(r'(?:"| |=)/[a-z]\w*/', path.read_text()), path


@pytest.mark.parametrize("name", sorted({*TABLES} - {"contenders"}))
def test_what_was_not_measured_says_which_command_does_it(name: str, tmp_path: Path) -> None:
    assert section(name, tmp_path).startswith("Not measured yet; `")


def test_only_what_stands_between_marks_is_replaced() -> None:
    text = "a\n<!-- figures:late -->\nold\n<!-- end -->\nb\n<!-- end -->\n"
    new = render(text, lambda name: f"new {name}")
    assert new == "a\n<!-- figures:late -->\nnew late\n<!-- end -->\nb\n<!-- end -->\n"
    with pytest.raises(UserError, match="there is no table 'early'"):
        render(text.replace("late", "early"))


@pytest.mark.parametrize("name", shipped_bundles())
def test_what_was_measured_of_a_bundle_is_of_the_weights_that_ship(name: str) -> None:
    assert json.loads((RESULTS / f"{name}.json").read_text())["weights"] == weights_digest(name)


def test_a_bundles_lines_have_the_papers_objective(tmp_path: Path) -> None:
    shutil.copy(RESULTS / "mnist.json", tmp_path)
    append_row(tmp_path / "accuracy.jsonl", row("coded-invnet-paper", 0.7))
    lines = {line["k"]: line for line in cells(section("bundles", tmp_path))}
    assert [lines[k]["paper's objective"] for k in ("2", "4", "10")] == ["", "", "70.00"]


def test_a_short_table_has_both_base_models_and_no_failures(tmp_path: Path) -> None:
    for one in (
        row("coded-invnet", 0.9),
        row("coded-invnet", 0.8, dataset="cifar10"),
        row("approxifer", 0.7, systematic=False),
        row("approxifer", 0.75, base="resnet", systematic=False),
        row("nercc", 0.5, dataset="cifar10", error="no luck"),
        row("parm", 0.4, k=4),
        {**row("none", 0.1, base="resnet"), "normal": 0.97},
    ):
        append_row(tmp_path / "accuracy.jsonl", one)
    lines = cells(section("late", tmp_path))
    late = {line["answer, % right"]: (line["mnist"], line["cifar10"]) for line in lines}
    assert late == {
        "direct, f": ("95.00", "95.00"),
        "direct, plain ResNet": ("95.00", ""),
        "coded-invnet": ("90.00", "80.00"),
        "approxifer": ("70.00", ""),
        "approxifer, plain ResNet": ("75.00", ""),
    }
    assert [line["extra workers"] for line in lines] == ["none", "none", "1", "1", "1"]


def test_simulated_rows_of_another_scheduler_are_stale(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The pages say so, and writing them ends with the command that makes the rows again."""
    name = "two-losses"
    monkeypatch.setattr(sweep, "QUICK_QUERIES", 300)
    sweep.run(
        sweep=ROOT / f"configs/bench/simulate-{name}.json",
        out=tmp_path / f"{name}.jsonl",
        quick=True,
    )
    assert "Stale" not in section(name, tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(sweep, "simulated_digest", lambda: "another")
        text = section(name, tmp_path)
    command = f"python -m benchmarks sweep configs/bench/simulate-{name}.json"
    assert f"> **Stale**: rows of an older scheduler; `{command}" in text
    assert fresh(text) == section(name, tmp_path)
    (tmp_path / "README.md").write_text(f"<!-- figures:{name} -->\n<!-- end -->\n")
    monkeypatch.setattr(figures, "pages", lambda: [tmp_path / "README.md"])
    monkeypatch.setattr(figures, "draw", lambda: None)
    monkeypatch.setattr(figures, "ROOT", tmp_path)
    monkeypatch.setattr(tables, "SHIPPED", tmp_path / "shipped.csv")
    monkeypatch.setattr(figures, "section", lambda _: text)
    with pytest.raises(UserError, match=command):
        figures.run(bundle=[], data_dir=None, measure=False, costs=False)


def test_a_digest_is_of_the_source_of_scheduler_driver_and_simulator(tmp_path: Path) -> None:
    def digest() -> str:
        simulated_digest.cache_clear()
        return simulated_digest(tmp_path)

    (tmp_path / "scheduler").mkdir()
    seen = [digest()]
    for name in ("driver.py", "scheduler/group.py", "scheduler/line.py"):
        (tmp_path / name).write_text("1")
        seen.append(digest())
    (tmp_path / "gateway.py").write_text("1")
    assert digest() == seen[-1]
    assert len({*seen}) == 4
