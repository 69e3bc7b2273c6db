from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest

from codedinvnet.codes.method import PARTS
from codedinvnet.codes.registry import METHODS, find_method
from codedinvnet.errors import UserError
from codedinvnet.evaluation.trials import (
    DataSetSettings,
    check_possible,
    load_grid,
    trained,
    trials,
    with_methods,
)
from codedinvnet.models.bundle import bundle_info

ROOT = Path(__file__).resolve().parents[2]
PART = {"epochs": 1}
PAPER = {"objective": "pixels", "groups": 100, "epochs": 1}


def raw(*blocks: dict[str, Any], **more: Any) -> dict[str, Any]:
    data = {"bundle": "mnist", "classifier": PART, "backup": PART, "parity": PART, "paper": PAPER}
    return {"name": "g", "datasets": {"mnist": data, "fashion": data}, "blocks": blocks, **more}


def written(folder: Path, *blocks: dict[str, Any], **more: Any) -> Path:
    path = folder / "grid.json"
    path.write_text(json.dumps(raw(*blocks, **more)))
    return path


def test_the_grid_of_ones_own_in_the_docs_is_one(tmp_path: Path) -> None:
    docs = ROOT / "docs" / "how-to" / "train-your-own-bundle.md"
    blocks = re.findall(r"```json\n(.*?)```", docs.read_text(encoding="utf-8"), re.DOTALL)
    (text,) = [block for block in blocks if '"datasets"' in block]
    path = tmp_path / "mine-grid.json"
    path.write_text(text)
    found = trials(load_grid(path))
    assert [(trial.method, trial.base, trial.k) for trial in found] == [
        ("coded-invnet", "invertible", 10),
        ("small-backup", "invertible", 10),
    ]


GRIDS = ROOT / "configs" / "bench"


def test_the_grids_that_ship_have_every_method_and_train_alike() -> None:
    names = ("accuracy", "equal-cost", "superposition")
    one, other, last = (load_grid(GRIDS / f"{name}.json") for name in names)
    every = {t.method for grid in (one, other, last) for t in trials(grid)}
    assert {find_method(name.partition("@")[0]).name for name in every} == set(METHODS)
    assert set(one.datasets) == set(other.datasets)
    for name, data in one.datasets.items():
        assert data.backup == other.datasets[name].backup
        assert last.datasets[name].backup == data.backup.model_copy(update={"batch_size": 1280})
    for trial in [*trials(other), *trials(last)]:
        check_possible(trial, bundle_info(trial.bundle), 10_000)


def test_the_grid_that_ships_has_its_methods_on_both_bases() -> None:
    grid = load_grid(GRIDS / "accuracy.json")
    found = list(trials(grid))
    assert set(grid.datasets) == {"mnist", "fashion", "cifar10"}
    for method in ("parm", "approxifer", "nercc"):
        for dataset in grid.datasets:
            cells = {(t.base, t.k) for t in found if (t.method, t.dataset) == (method, dataset)}
            sizes = (10,) if dataset == "cifar10" else (2, 4, 10)
            assert cells >= {(b, k) for b in ("invertible", "resnet") for k in sizes}
    assert len({t.seed for t in found if t.method == "parm"}) == 3
    paper = {(t.dataset, t.k) for t in found if t.method == "coded-invnet-paper"}
    assert paper == {(dataset, k) for dataset in grid.datasets for k in (2, 4, 10)}
    for name, data in grid.datasets.items():
        assert data.paper is not None
        shipped = bundle_info(name).model.encoder
        cost = (int(math.hypot(shipped.width, shipped.cell_width)), shipped.depth)
        assert (data.paper.encoder.width, data.paper.encoder.depth) == cost
    for trial in found:
        check_possible(trial, bundle_info(trial.bundle), 10_000)


def test_a_block_is_a_product_and_trials_come_once(tmp_path: Path) -> None:
    block = {"methods": ["none", "parm"], "k": [2, 4], "seeds": [1, 2], "missing": [0, 1]}
    grid = load_grid(written(tmp_path, block, {**block, "methods": ["parm"], "k": [2]}))
    found = list(trials(grid))
    assert len(found) == len(set(found)) == 2 * (2 * 2 + 2 * 2 * 2)
    assert {t.seed for t in found if t.method == "none"} == {1}
    assert {t.seed for t in found if t.method == "parm"} == {1, 2}


def test_blocks_of_other_seeds_do_not_repeat_what_is_not_trained(tmp_path: Path) -> None:
    block = {"methods": ["none", "parm"], "datasets": ["mnist"], "k": [2]}
    grid = load_grid(written(tmp_path, *({**block, "seeds": [seed]} for seed in (1, 2))))
    found = [(trial.method, trial.seed) for trial in trials(grid)]
    assert found == [("none", 1), ("parm", 1), ("parm", 2)]


def test_seeds_matter_where_something_is_trained() -> None:
    assert trained(METHODS["approxifer"], "resnet")
    assert not trained(METHODS["approxifer"], "invertible")
    assert trained(METHODS["small-backup"], "invertible")
    assert not trained(METHODS["coded-invnet"], "invertible")
    assert not trained(None, "invertible")


def test_a_blocks_bundle_label_and_groupings(tmp_path: Path) -> None:
    block = {
        "methods": ["coded-invnet"],
        "datasets": ["fashion"],
        "k": [4],
        "bundle": "runs/{dataset}/fusion-k{k}/bundle",
        "label": "paper",
        "groupings": 9,
    }
    (trial,) = trials(load_grid(written(tmp_path, block, groupings=3)))
    assert trial.bundle == "runs/fashion/fusion-k4/bundle"
    assert (trial.label, trial.method, trial.groupings) == ("paper", "coded-invnet", 3)
    assert trial.name() == "paper on fashion (invertible), k = 4, 1 missing, seed 1"


def test_patterns_stand_in_the_settings_and_not_in_the_name_of_a_trial(tmp_path: Path) -> None:
    block = {"methods": ["none"], "datasets": ["mnist"], "k": [10]}
    several = {**block, "missing": [2], "patterns": 300}
    one, two = trials(load_grid(written(tmp_path, block, several, patterns=40)))
    assert (one.patterns, two.patterns) == (40, 300)
    assert "patterns" not in one.as_dict()


@pytest.mark.parametrize(
    ("block", "told"),
    [
        ({"methods": ["pram"]}, r"blocks\.0\.methods: unknown 'pram': did you mean 'parm'"),
        ({"methods": ["zzz"]}, "unknown 'zzz': known: coded-invnet, small-backup, collage"),
        ({"methods": ["parm"], "datasets": ["mnits"]}, "datasets: unknown 'mnits'.*'mnist'"),
        ({"methods": ["oracle"], "bases": ["resnet"]}, "oracle needs the invertible base"),
        (
            {"methods": ["coded-invnet-paper"], "bases": ["resnet"]},
            "paper needs the invertible base",
        ),
        (
            {"methods": ["coded-invnet-paper"], "bundle": "x", "label": "a"},
            "paper runs on the data",
        ),
        ({"methods": ["parm"], "bundle": "x"}, r"bundle: parm runs on the data set's base models"),
        ({"methods": ["oracle"], "bundle": "x/{data}"}, r"bundle: braces are for.*'x/\{data\}'"),
        ({"methods": ["oracle"], "bundle": "x/{"}, r"bundle: braces are for \{dataset\} and"),
        ({"methods": ["oracle"], "bundle": "x/{}"}, r"blocks\.0\.bundle: braces are for"),
        ({"methods": ["oracle"], "bundle": "x/{k[0]}"}, r"blocks\.0\.bundle: braces are for"),
        (
            {"methods": ["coded-invnet"], "bundle": "x"},
            r"label: 'coded-invnet' stands for coded-invnet in the tables: name coded-invnet of "
            "bundle 'x' otherwise",
        ),
        (
            {"methods": ["coded-invnet"], "bundle": "x", "label": "coded-invnet"},
            r"blocks\.0\.label: 'coded-invnet' stands for coded-invnet in",
        ),
        ({"methods": ["nercc"], "label": "parm"}, r"label: 'parm' stands for parm in the tables"),
        ({"methods": ["nercc", "parm"], "label": "a"}, r"label: 'a' stands for nercc in the"),
        ({"methods": ["parm"], "label": ""}, r"blocks\.0\.label"),
        ({"methods": ["parm"], "datasets": []}, r"blocks\.0\.datasets.*at least 1"),
        ({"methods": ["parm"], "bases": ["vgg"]}, r"blocks\.0\.bases"),
        ({"methods": ["parm"], "k": [1]}, r"blocks\.0\.k.*greater than or equal to 2"),
        (
            {"methods": ["parm"], "patterns": 1001},
            r"blocks\.0\.patterns.*less than or equal to 1000",
        ),
        ({"methods": ["parm"], "seeds": [2**63]}, r"blocks\.0\.seeds\.0.*less than"),
        ({"methods": []}, r"blocks\.0\.methods"),
        ({"methods": ["parm"], "kk": [2]}, r"unknown key 'blocks\.0\.kk': did you mean 'k'"),
    ],
)
def test_mistakes_are_told_in_one_line(tmp_path: Path, block: dict[str, Any], told: str) -> None:
    with pytest.raises(UserError, match=told) as caught:
        load_grid(written(tmp_path, block))
    assert "\n" not in str(caught.value)
    assert "grid.json" in str(caught.value)


def test_a_label_stands_for_one_thing_in_the_whole_grid(tmp_path: Path) -> None:
    block = {"methods": ["coded-invnet"], "label": "other", "bundle": "x"}
    load_grid(written(tmp_path, block, {**block, "k": [2]}))
    with pytest.raises(UserError, match=r"blocks\.1\.label: 'other' stands for .* bundle 'x' in"):
        load_grid(written(tmp_path, block, {**block, "bundle": "y"}))


def test_each_method_of_ones_own_is_tried_on_its_own_bases(tmp_path: Path) -> None:
    path = tmp_path / "mine.py"
    path.write_text(
        "from codedinvnet.codes.plain import Plain\n"
        "class Any(Plain):\n    name = 'any-base'\n"
        "class Bundles(Plain):\n    name, of_bundle = 'bundles-alone', True\n"
    )
    block = {"methods": ["none"], "datasets": ["mnist"], "bases": ["invertible", "resnet"]}
    grid = load_grid(written(tmp_path, {**block, "k": [2]}))
    texts = ("none", f"{path}:Any", f"{path}:Bundles")
    found = [(trial.method, trial.base) for trial in trials(with_methods(grid, texts))]
    assert found == [
        *(("none", "invertible"), ("none", "resnet")),
        *(("any-base", "invertible"), ("any-base", "resnet")),
        ("bundles-alone", "invertible"),
    ]
    assert with_methods(grid, ("none",)) == grid


def test_the_papers_encoder_needs_its_settings(tmp_path: Path) -> None:
    grid = raw({"methods": ["none", "coded-invnet-paper"]})
    grid["datasets"]["fashion"] = {**grid["datasets"]["fashion"], "paper": None}
    (tmp_path / "grid.json").write_text(json.dumps(grid))
    told = r"missing key 'datasets\.fashion\.paper' for coded-invnet-paper"
    with pytest.raises(UserError, match=told):
        load_grid(tmp_path / "grid.json")
    grid["blocks"][0]["datasets"] = ["mnist"]
    (tmp_path / "grid.json").write_text(json.dumps(grid))
    load_grid(tmp_path / "grid.json")


def test_every_part_has_a_key_of_a_data_set() -> None:
    assert {*PARTS, "bundle"} == {*DataSetSettings.model_fields}


@pytest.mark.parametrize("key", ["classifier", "parity"])
def test_what_has_no_teacher_has_none_that_is_consistent(key: str, tmp_path: Path) -> None:
    grid = raw({"methods": ["none"]})
    own = {**PART, "consistent_teacher": True}
    grid["datasets"]["mnist"] = {**grid["datasets"]["mnist"], "backup": own}
    (tmp_path / "grid.json").write_text(json.dumps(grid))
    load_grid(tmp_path / "grid.json")
    grid["datasets"]["mnist"] = {**grid["datasets"]["mnist"], key: own}
    (tmp_path / "grid.json").write_text(json.dumps(grid))
    with pytest.raises(UserError, match=rf"{key}\.consistent_teacher: only the backup has"):
        load_grid(tmp_path / "grid.json")


@pytest.mark.parametrize("key", ["backup", "classifier"])
def test_a_parity_model_alone_is_asked_whether_it_sees_augmented_images(
    key: str, tmp_path: Path
) -> None:
    grid = raw({"methods": ["none"]})
    grid["datasets"]["mnist"]["parity"] = {**PART, "augment": True}
    (tmp_path / "grid.json").write_text(json.dumps(grid))
    load_grid(tmp_path / "grid.json")
    grid["datasets"]["mnist"][key] = {**PART, "augment": True}
    (tmp_path / "grid.json").write_text(json.dumps(grid))
    with pytest.raises(UserError, match=rf"{key}\.augment: it sees such images in any case"):
        load_grid(tmp_path / "grid.json")


def test_a_data_sets_bundle_is_a_name_as_it_stands(tmp_path: Path) -> None:
    grid = raw({"methods": ["none"], "datasets": ["mnist"], "k": [2]})
    grid["datasets"]["mnist"] = {**grid["datasets"]["mnist"], "bundle": "runs/{x}"}
    (tmp_path / "grid.json").write_text(json.dumps(grid))
    (trial,) = trials(load_grid(tmp_path / "grid.json"))
    assert trial.bundle == "runs/{x}"


def test_a_misspelt_key_of_a_data_set(tmp_path: Path) -> None:
    grid = raw({"methods": ["parm"]})
    grid["datasets"]["mnist"] = {**grid["datasets"]["mnist"], "parity": {"epoch": 3}}
    (tmp_path / "grid.json").write_text(json.dumps(grid))
    told = r"unknown key 'datasets\.mnist\.parity\.epoch': did you mean 'epochs'"
    with pytest.raises(UserError, match=told):
        load_grid(tmp_path / "grid.json")


def test_files_that_are_no_grids(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot read the grid"):
        load_grid(tmp_path / "none.json")
    (tmp_path / "bad.json").write_text("{")
    with pytest.raises(UserError, match=r"bad\.json is not JSON"):
        load_grid(tmp_path / "bad.json")


@pytest.mark.parametrize(
    ("block", "told"),
    [
        ({"methods": ["coded-invnet"], "k": [12]}, "serves groups of 2 to 10"),
        ({"methods": ["parm"], "k": [500]}, "only 200 test images"),
        ({"methods": ["parm"], "k": [2], "missing": [2]}, "one of the k must be left"),
        ({"methods": ["parm"], "k": [4], "missing": [2], "corrupt": [2]}, "2 corrupt, seed 1: one"),
    ],
)
def test_what_cannot_be_done(tmp_path: Path, block: dict[str, Any], told: str) -> None:
    trial = next(trials(load_grid(written(tmp_path, block))))
    with pytest.raises(UserError, match=told):
        check_possible(trial, bundle_info("mnist"), 200)


def test_how_many_images_there_are_may_not_be_known_yet(tmp_path: Path) -> None:
    trial = next(trials(load_grid(written(tmp_path, {"methods": ["parm"], "k": [500]}))))
    check_possible(trial, bundle_info("mnist"), None)
