"""The settings of `bench accuracy`'s grids, and their trials."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from codedinvnet.codes.registry import METHODS, find_method
from codedinvnet.common.errors import UserError
from codedinvnet.evaluation.trials import GRID, check_possible, load_grid, trials, with_methods
from codedinvnet.models.bundle import bundle_info

ROOT = Path(__file__).resolve().parents[2]
PART = {"epochs": 1}
PAPER = {"objective": "pixels", "groups": 100, "epochs": 1}


def written(folder: Path, *blocks: dict[str, Any], **more: Any) -> Path:
    data = {"bundle": "mnist", "classifier": PART, "backup": PART, "parity": PART, "paper": PAPER}
    grid = {"name": "g", "datasets": {"mnist": data, "fashion": data}, "blocks": blocks, **more}
    path = folder / "grid.json"
    path.write_text(json.dumps(grid))
    return path


def test_the_grid_in_the_docs_is_one(tmp_path: Path) -> None:
    docs = ROOT / "docs" / "how-to" / "train-your-own-bundle.md"
    blocks = re.findall(r"```json\n(.*?)```", docs.read_text(encoding="utf-8"), re.DOTALL)
    (text,) = [block for block in blocks if '"datasets"' in block]
    path = tmp_path / "mine-grid.json"
    path.write_text(text)
    found = [(trial.method, trial.base, trial.k) for trial in trials(load_grid(path))]
    assert found == [("coded-invnet", "invertible", 10), ("small-backup", "invertible", 10)]


def test_the_grid_that_ships_has_every_method_and_can_be_done() -> None:
    found = list(trials(load_grid(GRID)))
    assert {find_method(t.method.partition("@")[0]).name for t in found} == set(METHODS)
    for trial in found:
        check_possible(trial, bundle_info(trial.bundle), 10_000)


def test_a_block_is_a_product_and_trials_come_once(tmp_path: Path) -> None:
    block = {"methods": ["none", "parm"], "k": [2, 4], "seeds": [1, 2], "missing": [0, 1]}
    again = {**block, "methods": ["none", "parm"], "k": [2], "seeds": [2]}
    found = list(trials(load_grid(written(tmp_path, block, again))))
    assert len(found) == len(set(found)) == 2 * (2 * 2 + 2 * 2 * 2)
    assert {t.seed for t in found if t.method == "none"} == {1}  # nothing of it is trained
    assert {t.seed for t in found if t.method == "parm"} == {1, 2}


NONE = {"methods": ["none"]}


@pytest.mark.parametrize(
    ("blocks", "why"),
    [
        ([{"methods": ["pram"]}], "unknown 'pram': did you mean 'parm'?"),
        ([{**NONE, "datasets": ["cifar"]}], "blocks.0.datasets: unknown 'cifar'"),
        ([{**NONE, "patterns": 1001}], "blocks.0.patterns"),
        ([{**NONE, "typo": 1}], "blocks.0.typo"),
        ([{"methods": ["coded-invnet"], "bases": ["resnet"]}], "needs the invertible base model"),
    ],
)
def test_mistakes_in_a_grid_are_refused(
    blocks: list[dict[str, Any]], why: str, tmp_path: Path
) -> None:
    with pytest.raises(UserError) as caught:
        load_grid(written(tmp_path, *blocks))
    assert why in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_method_of_ones_own_is_tried_where_the_first_block_is(tmp_path: Path) -> None:
    own = f"{ROOT / 'examples' / 'my_method.py'}:TwoParities"
    block = {"methods": ["none"], "k": [4], "bases": ["invertible", "resnet"]}
    grid = with_methods(load_grid(written(tmp_path, block)), [own, "none"])
    (name,) = {t.method for t in trials(grid)} - {"none"}
    assert {(t.dataset, t.k) for t in trials(grid) if t.method == name} == {
        ("mnist", 4),
        ("fashion", 4),
    }
    assert with_methods(grid, [own]) == grid
    with pytest.raises(UserError, match="there is no file"):
        with_methods(grid, ["nowhere.py:Mine"])
