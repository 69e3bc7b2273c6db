from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from codedinvnet.codes.build import scheme_for
from codedinvnet.codes.equal_cost import count_macs, macs, plain_network, plain_width, served_macs
from codedinvnet.codes.mean import MeanCode
from codedinvnet.codes.registry import METHODS
from codedinvnet.common.errors import UserError
from codedinvnet.common.grid import latest, read_rows
from codedinvnet.evaluation.accuracy import evaluate
from codedinvnet.evaluation.stages import evaluation_images
from codedinvnet.evaluation.tables import TRIAL
from codedinvnet.models.bundle import load_bundle
from codedinvnet.models.checkpoint import load_checkpoint, save_checkpoint
from tests.conftest import Command
from tests.evaluation.grids import PART, TRIALS, run, write_grid

EXAMPLE = f"{Path(__file__).parents[2] / 'examples' / 'my_method.py'}:TwoParities"


@pytest.fixture(scope="module")
def finished(
    bundle_folder: Path, data_dir: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Path]:
    """A grid with every method, done."""
    folder = tmp_path_factory.mktemp("accuracy")
    grid = write_grid(folder / "grid.json", bundle_folder)
    counts = run(grid, folder, data_dir)
    assert counts == {"trials": TRIALS, "kept": 0, "done": TRIALS, "failed": 0}
    return folder, grid


def test_every_method_has_a_row_with_what_it_depends_on(finished: tuple[Path, Path]) -> None:
    rows = read_rows(finished[0] / "rows.jsonl")
    assert {row["method"] for row in rows} == {*METHODS}
    assert len({row["key"] for row in rows}) == len(rows) == TRIALS
    for row in rows:
        assert row["error"] is None
        for field in ("commit", "machine", "seed", "seconds", "settings", "began"):
            assert row[field] not in (None, ""), field
        assert 0 <= row["recovered"] <= 1
        assert len(row["counts"]) == 2


def test_rows_say_what_is_known_of_the_methods(finished: tuple[Path, Path]) -> None:
    rows = read_rows(finished[0] / "rows.jsonl")
    one = {(r["method"], r["base"]): r for r in rows if r["missing"] == 1}
    normal = one["none", "invertible"]["normal"]
    assert one["coded-invnet", "invertible"]["normal"] == normal
    assert one["oracle", "invertible"]["recovered"] == pytest.approx(normal, abs=0.01)
    assert one["replication", "invertible"]["recovered"] == pytest.approx(normal)
    assert one["none", "invertible"]["answered"] == 0.0
    assert not one["nercc", "resnet"]["systematic"]
    for name, base in (("nercc", "resnet"), ("nercc", "invertible")):
        assert len(one[name, base]["chosen"]["smoothing"]) == 2
        assert {"tuning", "tuning_images"} <= one[name, base]["settings"].keys()
    two = {r["method"]: r for r in rows if r["missing"] == 2}
    assert two["coded-invnet"]["answered"] == 0.0  # one parity makes up for one
    assert two["small-backup"]["answered"] > 0.5


def test_rows_say_what_a_method_costs(finished: tuple[Path, Path], bundle_folder: Path) -> None:
    """What the extra worker computes for a group, and what a query takes, in multiply-adds."""
    rows = read_rows(finished[0] / "rows.jsonl")
    model = load_bundle(bundle_folder).model
    network = plain_network(model, plain_width(model)).eval()
    queries = {"invertible": served_macs(model), "resnet": macs(network, model)}
    for row in rows:
        assert row["served_macs"] == queries[row["base"]]
    one = {(r["method"], r["base"]): r for r in rows if r["missing"] == 1}
    extra = {place: row["extra_macs"] for place, row in one.items()}
    for base, query in queries.items():
        assert extra["none", base] == 0
        assert extra["replication", base] == 4 * query
        assert query < extra["approxifer", base] < 1.1 * query  # with encoding
    embedding = macs(model.network, model)
    encoding = count_macs(lambda: model.encoder(torch.zeros(1, 4, *model.input_shape)))
    assert extra["coded-invnet", "invertible"] == embedding + encoding
    assert extra["oracle", "invertible"] > 4 * embedding
    assert 0.7 * queries["invertible"] < extra["small-backup", "invertible"] < queries["invertible"]


SERVES_ANOTHER = """
import torch
from torch import nn
from codedinvnet.codes.plain import Replication

class Mine(Replication):
    name = "serves-another"

    def build(self, given):
        negated = nn.Linear(given.classes, given.classes, bias=False)
        negated.weight.data = -torch.eye(given.classes)
        served = nn.Sequential(given.classifier, negated)
        return self.scheme(super().build(given).code, given, served=served)
"""


def test_a_method_is_scored_by_the_model_that_it_serves(
    bundle_folder: Path, data_dir: Path, tmp_path: Path
) -> None:
    """Which is no base model, though its data tasks send scores as well."""
    (tmp_path / "mine.py").write_text(SERVES_ANOTHER)
    methods = ["replication", f"{tmp_path / 'mine.py'}:Mine"]
    run(
        write_grid(tmp_path / "grid.json", bundle_folder, [{"methods": methods}]),
        tmp_path,
        data_dir,
    )
    base, mine = read_rows(tmp_path / "rows.jsonl")
    assert mine["error"] is None
    assert mine["normal"] == mine["recovered"] < 0.3 < base["normal"]  # the least likely class
    assert mine["served_macs"] == base["served_macs"] + 10 * 10


def test_a_finished_grid_is_kept_and_its_parts_are_not_trained_again(
    finished: tuple[Path, Path], data_dir: Path
) -> None:
    folder, grid = finished
    before = {p: p.stat().st_mtime_ns for p in (folder / "runs").rglob("*.safetensors")}
    # resnet, backup, parm and coded-invnet-paper: last and best
    assert len(before) == 2 * 4
    counts = run(grid, folder, data_dir)
    assert counts == {"trials": TRIALS, "kept": TRIALS, "done": 0, "failed": 0}
    bundle = json.loads(grid.read_text())["datasets"]["mnist"]["bundle"]
    blocks = [{"methods": ["small-backup", "parm"], "missing": [0]}]
    assert run(write_grid(folder / "more.json", bundle, blocks), folder, data_dir)["done"] == 2
    assert before == {p: p.stat().st_mtime_ns for p in (folder / "runs").rglob("*.safetensors")}


def test_the_papers_encoder_is_trained_beside_a_base_model_that_stays(
    finished: tuple[Path, Path], bundle_folder: Path
) -> None:
    rows = {r["method"]: r for r in read_rows(finished[0] / "rows.jsonl") if r["missing"] == 1}
    paper = rows["coded-invnet-paper"]
    assert paper["settings"]["paper"]["groups"] == 40
    assert paper["normal"] == rows["coded-invnet"]["normal"]
    assert paper["recovered"] != rows["coded-invnet"]["recovered"]
    (best,) = (finished[0] / "runs").rglob("coded-invnet-paper-of-invertible-k4/seed1/best.*")
    bundle = load_bundle(bundle_folder)
    method = scheme_for(load_bundle(bundle_folder), 4, "coded-invnet-paper", best)
    assert isinstance(method.code, MeanCode)
    mine, its = method.code.model.network.state_dict(), bundle.model.network.state_dict()
    torch.testing.assert_close(mine, its, rtol=0, atol=0)


def test_parts_of_other_settings_are_trained_anew(
    bundle_folder: Path, data_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Whatever of a setting changes, a trial is done again and no row is an error."""
    bundle = tmp_path / "bundle"
    shutil.copytree(bundle_folder, bundle)
    grid = write_grid(tmp_path / "grid.json", bundle, [{"methods": ["parm"]}])
    headers = []

    def done() -> None:
        counts = run(grid, tmp_path, data_dir)
        assert (counts["done"], counts["failed"]) == (1, 0), read_rows(tmp_path / "rows.jsonl")[-1]
        (last,) = (tmp_path / "runs").rglob("seed1/last.safetensors")
        headers.append(load_checkpoint(last)[1])

    done()
    raw = json.loads(grid.read_text())
    raw["datasets"]["mnist"]["parity"] = {**PART, "epochs": 2}  # more of them: not resumed
    grid.write_text(json.dumps(raw))
    done()
    raw["datasets"]["mnist"]["parity"] = {**PART, "batch_size": 8}  # fewer: not taken for finished
    grid.write_text(json.dumps(raw))
    done()
    tensors, header = load_checkpoint(bundle / "weights.safetensors")
    other = {key: 1.01 * value for key, value in tensors.items()}
    save_checkpoint(bundle / "weights.safetensors", other, header)
    done()
    assert [header["epoch"] for header in headers] == [1, 2, 1, 1]
    assert "starts over; the old checkpoints are in " in capsys.readouterr().err
    kept = [
        load_checkpoint(path)[1]
        for path in sorted((tmp_path / "runs").rglob("seed1/checkpoints-before-*/last.safetensors"))
    ]
    assert kept == headers[:3]
    digests = [header["settings"]["bundle"] for header in headers]
    assert len(set(digests[:3])) == 1 != len(set(digests[2:]))


def retrained(runs: Path) -> set[str]:
    """Return the names of the parts that were trained a second time."""
    return {path.parents[1].name for path in runs.rglob("checkpoints-before-1")}


@pytest.mark.parametrize("split", ["train", "test"])
def test_other_images_are_measured_anew_and_trained_on_anew(
    split: str, bundle_folder: Path, data_dir: Path, tmp_path: Path
) -> None:
    """Even by the plain base model, which does not depend on the weights of a bundle."""
    blocks = [{"methods": ["none", "parm"], "bases": ["resnet"]}]
    grid = write_grid(tmp_path / "grid.json", bundle_folder, blocks)
    own = Path(shutil.copytree(data_dir, tmp_path / "data"))
    assert run(grid, tmp_path, own)["done"] == 2
    found = dict(np.load(own / "mnist" / f"{split}.npz"))
    found["images"][0] ^= 1
    np.savez(own / "mnist" / f"{split}.npz", **found)
    assert run(grid, tmp_path, own)["done"] == 2
    rows = read_rows(tmp_path / "rows.jsonl")
    assert list(latest(rows, TRIAL)["key"]) == [row["key"] for row in rows[2:]]
    expected = {"resnet", "parm-of-resnet-k4"} if split == "train" else set()
    assert retrained(tmp_path / "runs") == expected


def test_validation_images_are_scored_in_rows_of_their_own(
    bundle_folder: Path, data_dir: Path, tmp_path: Path, call: Command
) -> None:
    grid = write_grid(tmp_path / "grid.json", bundle_folder, [{"methods": ["coded-invnet"]}])
    words = ["bench", "accuracy", grid, "--data-dir", data_dir, "--save-dir", tmp_path]
    validation, test = tmp_path / "validation.jsonl", tmp_path / "test.jsonl"
    assert call(*words, "--split", "validation", "--out", validation).code == 0
    assert call(*words, "--out", test).code == 0
    (row,), (other,) = read_rows(validation), read_rows(test)
    bundle = load_bundle(bundle_folder)
    images = evaluation_images(bundle, "validation", data_dir)
    found = evaluate(scheme_for(bundle, 4), images, k=4, groupings=2, seed=0, progress=False)
    assert row["normal"] == pytest.approx(found.normal_accuracy, abs=1e-6)
    assert row["recovered"] == pytest.approx(found.recovered_accuracy, abs=1e-6)
    assert [total for _, total in row["counts"]] == [len(images)] * 2
    assert row["key"] != other["key"]
    assert "# Accuracy on validation images, %" in validation.with_suffix(".md").read_text()
    outcome = call(*words, "--out", validation)
    assert (outcome.code, outcome.err.count("\n")) == (2, 1)
    assert "has rows of another split: name another file (--out)" in outcome.err


def test_the_quick_version_without_images_does_what_needs_no_training(
    bundle_folder: Path, tmp_path: Path
) -> None:
    grid = write_grid(tmp_path / "grid.json", bundle_folder)
    with pytest.warns(UserWarning, match="only what needs no training") as told:
        counts = run(grid, tmp_path, tmp_path, quick=True)
    assert len(told) == 1
    assert counts["failed"] == 0
    rows = read_rows(tmp_path / "rows.jsonl")
    assert {(row["method"], row["missing"]) for row in rows} == {
        ("none", 1),
        ("replication", 1),
        ("approxifer", 1),
        ("coded-invnet", 1),
        ("coded-invnet", 2),
        ("oracle", 1),
        ("average-image", 1),
    }
    for row in rows:
        assert row["base"] == "invertible"
        assert (row["settings"]["test_images"], row["settings"]["train_images"]) == (1000, 0)
    assert not list((tmp_path / "runs").rglob("*.safetensors"))
    for folder, quick in ((tmp_path, False), (tmp_path / "missing", True)):
        with pytest.raises(UserError, match=r"holds no train images|does not exist"):
            run(grid, tmp_path, folder, quick=quick)


def test_the_command_compares_ones_own_method_with_the_shipped_rows(
    bundle_folder: Path, data_dir: Path, tmp_path: Path, call: Command
) -> None:
    grid = write_grid(tmp_path / "grid.json", bundle_folder, [{"methods": ["none"]}])
    words = ["bench", "accuracy", grid, "--data-dir", data_dir, "--save-dir", tmp_path / "runs"]
    out = tmp_path / "results" / "rows.jsonl"
    words += ["--out", out, "--method", EXAMPLE, "--device", "cpu"]
    ran = call(*words)
    assert ran.code == 0
    assert {"two-parities", "coded-invnet"} <= {line.split()[0] for line in ran.out.splitlines()}
    (row,) = read_rows(out)
    assert (row["method"], row["r"], row["answered"]) == ("two-parities", 2, 1)
    assert (row["settings"]["quick"], len(row["counts"])) == (False, 2)
    table = out.with_suffix(".md").read_text()
    methods = [line.split(" | ")[2] for line in table.splitlines() if line.startswith("| 4 | 1 |")]
    assert methods[0] == "two-parities"
    assert {"coded-invnet", "replication"} <= {*methods}
    assert table.startswith("# Accuracy, %\n")
    report = json.loads(call(*words, "--quick", "--json").out)
    assert (report["done"], report["failed"]) == (1, 0)
    assert {Path(p).name for p in report["written"]} == {"rows.md", "rows.csv"}
    quick = read_rows(out)[-1]
    assert (quick["settings"]["quick"], len(quick["counts"])) == (True, 1)
    table = out.with_suffix(".md").read_text()
    assert table.startswith("# Accuracy, %, measured in short on ")
    assert "| coded-invnet |" in table


def test_ones_own_method_is_measured_with_more_workers_missing(
    bundle_folder: Path, data_dir: Path, tmp_path: Path, call: Command
) -> None:
    """On the shipped grid's groups, with the patterns of its trials that miss as many."""
    blocks: list[dict[str, Any]] = [
        {"methods": ["none"], "k": [2, 4]},
        {"methods": ["none"], "missing": [2], "groupings": 1, "patterns": 7},
    ]
    grid = write_grid(tmp_path / "grid.json", bundle_folder, blocks)
    words = ["bench", "accuracy", grid, "--data-dir", data_dir, "--save-dir", tmp_path / "runs"]
    words += ["--out", tmp_path / "rows.jsonl", "--method", EXAMPLE, "--missing"]
    assert call(*words, "2").code == 0
    (row,) = read_rows(tmp_path / "rows.jsonl")
    assert (row["k"], row["missing"], row["answered"]) == (4, 2, 1)
    assert (row["settings"]["groupings"], row["settings"]["patterns"]) == (1, 7)
    outcome = call(*words, "4")
    assert (outcome.code, outcome.err.count("\n")) == (2, 1)
    assert "--missing 4: the grid's groups have at most 4" in outcome.err


@pytest.mark.parametrize(
    ("blocks", "more", "why"),
    [
        ([{"methods": ["coded-invnet"], "k": [5]}], {}, "groups of 2 to 4"),
        ([{"methods": ["none"], "missing": [4]}], {}, "at least one worker must answer"),
        ([{"methods": ["none"]}], {"only": ["dataset=fashion"]}, "no dataset=fashion"),
        ([{"methods": ["none"]}], {"methods": ["parm"]}, "'parm' is not one of"),
    ],
)
def test_what_cannot_be_done_is_refused_before_any_work(
    blocks: list[dict[str, Any]],
    more: dict[str, Any],
    why: str,
    bundle_folder: Path,
    tmp_path: Path,
) -> None:
    """And before an image set is looked for: there is none here."""
    grid = write_grid(tmp_path / "grid.json", bundle_folder, blocks)
    with pytest.raises(UserError) as caught:
        run(grid, tmp_path, tmp_path / "nothing", **more)
    assert why in str(caught.value)
    assert not (tmp_path / "rows.jsonl").exists()
