"""What `bench accuracy` refuses before any work."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from codedinvnet.errors import UserError
from codedinvnet.evaluation import methods
from codedinvnet.rows import append_row
from tests.conftest import Command
from tests.evaluation.canned import latency_row
from tests.evaluation.grids import run, write_grid


@pytest.mark.parametrize(
    ("blocks", "told"),
    [
        ([{"methods": ["pram"]}], "unknown 'pram': did you mean 'parm'?"),
        ([{"methods": ["none"], "datasets": ["cifar"]}], "unknown 'cifar'"),
        ([{"methods": ["none"]}, {"methods": ["coded-invnet"], "k": [5]}], "groups of 2 to 4"),
        ([{"methods": ["none"]}, {"methods": ["none"], "missing": [4]}], "one of the k must be"),
        (
            [{"methods": ["oracle"], "bundle": "nowhere/{dataset}", "label": "other"}],
            "no bundle 'nowhere/mnist'",
        ),
    ],
)
def test_mistakes_are_told_before_any_work(
    bundle_folder: Path,
    data_dir: Path,
    tmp_path: Path,
    blocks: list[dict[str, Any]],
    told: str,
    call: Command,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """And before an image set is looked for, which may mean a download."""
    monkeypatch.setattr(methods, "load_images", None)
    grid = write_grid(tmp_path / "grid.json", bundle_folder, blocks)
    out = tmp_path / "rows.jsonl"
    outcome = call("bench", "accuracy", grid, "--data-dir", data_dir, "--out", out)
    assert outcome.code == 2
    assert outcome.out == ""
    assert told in outcome.err
    assert outcome.err.count("\n") == 1
    assert not out.exists()


def test_a_method_of_ones_own_needs_settings_of_its_part_where_it_is_tried(
    bundle_folder: Path, data_dir: Path, tmp_path: Path
) -> None:
    """Of the data sets that are asked for alone."""
    path = tmp_path / "mine.py"
    path.write_text(
        "from codedinvnet.codes.backup import SmallBackup\n"
        "class Mine(SmallBackup):\n"
        "    name, part = 'mine-of-parities', 'parity'\n"
    )
    grid = write_grid(tmp_path / "grid.json", bundle_folder, [{"methods": ["none"]}])
    raw = json.loads(grid.read_text())
    mnist = raw["datasets"]["mnist"]
    raw["datasets"]["fashion"] = {k: v for k, v in mnist.items() if k != "parity"}
    grid.write_text(json.dumps(raw))
    mine = [f"{path}:Mine"]
    told = r"grid\.json: missing key 'datasets\.fashion\.parity' for mine-of-parities"
    with pytest.raises(UserError, match=told):
        run(grid, tmp_path, data_dir, methods=mine)
    assert run(grid, tmp_path, data_dir, methods=mine, only=["mnist"])["done"] == 1


def without_settings(path: Path, bundle: Path, block: dict[str, Any]) -> Path:
    """Write a grid that says how to train a small backup, and nothing else."""
    raw = json.loads(write_grid(path, bundle, [block]).read_text())
    mnist = raw["datasets"]["mnist"]
    raw["datasets"]["mnist"] = {key: mnist[key] for key in ("bundle", "backup")}
    path.write_text(json.dumps(raw))
    return path


@pytest.mark.parametrize(
    ("block", "told"),
    [
        ({"methods": ["none"], "bases": ["resnet"]}, "classifier' for the base resnet"),
        ({"methods": ["parm"]}, "parity' for parm"),
    ],
)
def test_settings_that_a_trial_needs_are_asked_for(
    bundle_folder: Path, data_dir: Path, tmp_path: Path, block: dict[str, Any], told: str
) -> None:
    grid = without_settings(tmp_path / "grid.json", bundle_folder, block)
    with pytest.raises(UserError, match=rf"missing key 'datasets\.mnist\.{told}"):
        run(grid, tmp_path, data_dir)


@pytest.mark.parametrize("quick", [False, True])
def test_settings_that_no_trial_needs_may_be_left_out(
    bundle_folder: Path, data_dir: Path, tmp_path: Path, quick: bool
) -> None:
    block = {"methods": ["none", "small-backup"]}
    grid = without_settings(tmp_path / "grid.json", bundle_folder, block)
    assert run(grid, tmp_path, data_dir, quick=quick)["done"] == 2


def test_a_training_of_the_papers_encoder_that_takes_no_step_is_told_before_any_work(
    bundle_folder: Path, data_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    blocks = [{"methods": ["none"]}, {"methods": ["coded-invnet-paper"]}]
    grid = write_grid(tmp_path / "grid.json", bundle_folder, blocks)
    raw = json.loads(grid.read_text())
    raw["datasets"]["mnist"]["paper"]["groups"] = 7
    grid.write_text(json.dumps(raw))
    monkeypatch.setattr(methods, "load_images", None)
    with pytest.raises(UserError, match=r"groups 7 do not make one step: one needs .* = 8"):
        run(grid, tmp_path, data_dir)


@pytest.mark.parametrize(
    ("spoil", "told"),
    [
        (lambda out: out.mkdir(), "cannot read the rows in"),
        (lambda out: out.parent.write_text(""), "cannot write to"),
        (
            lambda out: append_row(out, latency_row("coded", np.arange(9.0))),
            "line 1: a row of latency, not of bench accuracy",
        ),
        (
            lambda out: append_row(out, {"schema_version": 1, "cell": {}}),
            "line 1: a row of something else",
        ),
    ],
)
def test_a_place_for_rows_that_cannot_be_used_is_told_before_any_work(
    spoil: Callable[[Path], Any],
    told: str,
    bundle_folder: Path,
    data_dir: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    grid = write_grid(tmp_path / "grid.json", bundle_folder, [{"methods": ["none"]}])
    out = tmp_path / "results" / "rows.jsonl"
    if told != "cannot write to":
        out.parent.mkdir()
    spoil(out)
    monkeypatch.setattr(methods, "load_images", None)
    with pytest.raises(UserError, match=told):
        run(grid, out.parent, data_dir)


def test_an_unknown_image_set_and_choice(
    bundle_folder: Path, data_dir: Path, tmp_path: Path
) -> None:
    grid = write_grid(tmp_path / "grid.json", bundle_folder, [{"methods": ["none"]}])
    with pytest.raises(UserError, match=r"--dataset: 'fashion' is not one of .*: mnist"):
        run(grid, tmp_path, data_dir, only=["fashion"])
    with pytest.raises(UserError, match=r"--method: 'parm' is not one of .*: none"):
        run(grid, tmp_path, data_dir, methods=["parm"])
    raw = json.loads(grid.read_text())
    raw["datasets"]["mnits"] = raw["datasets"].pop("mnist")
    grid.write_text(json.dumps(raw))
    with pytest.raises(UserError, match="mnits"):
        run(grid, tmp_path, data_dir)
