"""The benchmarks of protected models: what they read, what they count, and one run of each."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks import protected, recommended, straggling
from benchmarks.command_line import main
from benchmarks.recommended import Made
from codedinvnet.errors import UserError
from codedinvnet.evaluation.client import Reply
from codedinvnet.evaluation.grid import read_rows
from codedinvnet.models import open_model
from codedinvnet.protect import distil
from codedinvnet.protect.folder import DESCRIPTION, WEIGHTS, load_part
from codedinvnet.protect.inputs import Inputs, split
from tests.conftest import Command
from tests.protect.factories import FEATURES, vectors


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    """A model in a file, with inputs."""
    folder = tmp_path_factory.mktemp("model")
    module, example = vectors()
    free = ({0: torch.export.Dim.DYNAMIC},)
    example = example.repeat(2, 1)
    path = folder / "model.onnx"
    named: dict[str, Any] = {"output_names": ["output"], "external_data": False}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of PyTorch, about itself
        torch.onnx.export(module.eval(), (example,), path, dynamic_shapes=free, **named)
    x = np.random.default_rng(0).random((700, FEATURES), np.float32)
    return Made(path, x, 400)


@pytest.fixture(scope="module")
def row(made: Made) -> dict[str, Any]:
    with pytest.MonkeyPatch.context() as changed:
        changed.setattr(recommended, "K", 3)
        changed.setattr(distil, "MOST_ROUNDS", 40)
        changed.setattr(distil, "FEWEST_STEPS", 8)
        return recommended.measured(made, made.path.parent, 5.0)


def test_recommendations_are_measured_on_other_inputs(made: Made, row: dict[str, Any]) -> None:
    assert set(row["agreement"]) == {"small-backup", "approxifer", "nercc"}
    assert row["inputs"] == 300
    fresh = made.inputs[400:]
    student = load_part(made.path.parent / "protection" / WEIGHTS)
    with torch.inference_mode():
        mine = student(torch.from_numpy(fresh)).argmax(1).numpy()
    wanted = open_model(made.path).run({"x": fresh})["output"].argmax(1)
    assert row["agreement"]["small-backup"] == pytest.approx((mine == wanted).mean(), abs=1e-4)
    assert row["most_frequent"] == pytest.approx(np.bincount(wanted).max() / 300, abs=1e-4)
    best = max(row["agreement"].values())
    assert row["right"] == (row["agreement"][row["recommended"]] >= best - 0.01)


def test_a_row_names_no_folder_of_the_machine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = tmp_path / "digits-mlp-protection"
    made.mkdir()
    parts = {name: {"source": f"/far/away/{name}.onnx"} for name in ("model", "own_backup")}
    (made / DESCRIPTION).write_text(json.dumps(parts))
    monkeypatch.setattr(protected, "RESULTS", tmp_path)
    recipe = protected.Recipe(lambda folder, source: folder, ())
    monkeypatch.setattr(protected, "RECIPES", {"digits-mlp": recipe})
    row = json.loads(Path(protected.run("digits-mlp", tmp_path, None, 1.0)["row"]).read_text())
    assert [row[name]["source"] for name in parts] == ["model.onnx", "own_backup.onnx"]


def test_a_worse_recommendation_is_not_right(
    made: Made, row: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    found = {"small-backup": 0.8, "approxifer": 0.9, "nercc": 0.1}
    found[row["recommended"]] -= 0.5
    monkeypatch.setattr(recommended, "agreement", lambda *words: found[words[2]])
    again = recommended.measured(made, made.path.parent, 5.0)
    assert not again["right"]
    assert "0 of 1 recommendations are right" in recommended.table([{"model": "m", **again}])


def test_a_protected_model_is_served_under_stragglers(
    made: Made, row: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(straggling, "ARMS", ("coded",))  # each takes a service of its own
    out = tmp_path / "rows.jsonl"
    words = ["straggling", str(made.path.parent / "protection"), str(made.path), "--inputs"]
    words += [str(made.path.parent / "inputs.npy"), "--requests", "60", "--load", "0.3"]
    words += ["--out", str(out), "--stragglers", "held", "--log", str(tmp_path / "log")]
    assert main([*words, "--method", "approxifer"]) == 2
    words += ["--method", "small-backup"]
    assert main([*words, "--workers", "3"]) == 2
    words += ["--workers", "4"]
    assert main(words) == 0
    rows = read_rows(out)
    assert [found["policy"] for found in rows] == ["coded"]
    for found in rows:
        assert found["errors"] == 0
        assert found["agreement"] > 0.9
        assert found["p50_ms"] > 20  # the wait that stands for a machine of its own
    before = out.read_text()
    assert main(words) == 0  # nothing is done twice
    assert out.read_text() == before


def test_all_arms_meet_the_draws_of_their_straggler_model(
    made: Made, row: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seeds: list[int] = []

    def serving(*_: Any, seed: int, **__: Any) -> None:
        seeds.append(seed)
        raise UserError("enough is known")

    monkeypatch.setattr(straggling, "serving", serving)
    words = ["straggling", str(made.path.parent / "protection"), str(made.path), "--workers", "4"]
    words += ["--inputs", str(made.path.parent / "inputs.npy"), "--method", "small-backup"]
    words += ["--out", str(tmp_path / "rows.jsonl"), "--log", str(tmp_path / "log")]
    for straggler in ("held", "pareto", "held"):
        for arm in ("hedge", "coded"):
            monkeypatch.setattr(straggling, "ARMS", (arm,))
            assert main([*words, "--stragglers", straggler]) == 2
    held, _, pareto, *again = seeds
    assert seeds[:2] == [held, held] == again[1:]
    assert seeds[2:4] == [pareto, pareto]
    assert held != pareto


@pytest.mark.parametrize("smaller", [False, True])
def test_a_smaller_model_beside_the_model_is_its_backup(
    smaller: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the row `lite2`, for one."""
    told: list[str] = []

    def make(folder: Path, _: Path | None) -> Path:
        if smaller:
            (folder / protected.BACKUP).touch()
        return folder

    def protect(words: list[str]) -> int:
        told.extend(words)
        return 2

    recipe = protected.Recipe(make, ())
    monkeypatch.setattr(protected, "RECIPES", {"own": recipe})
    monkeypatch.setattr(recommended, "main", protect)
    with pytest.raises(UserError, match="codedinvnet protect failed"):
        protected.run("own", tmp_path, None, 1.0)
    assert ("--backup" in told) == smaller


def test_agreement_is_counted_of_all_and_of_approximate_answers() -> None:
    wanted = np.array([0, 1, 2])
    replies = [
        Reply("a", (0, 1), 0.1, 200, labels=np.array([0, 1]), outcomes=("direct", "decoded")),
        Reply("b", (2, 1), 0.1, 200, labels=np.array([2, 0]), outcomes=("direct", "guessed")),
        Reply("c", (0,), 0.1, 504),
    ]
    assert straggling.answers(replies, wanted) == {
        "errors": 1,
        "agreement": 0.75,
        "approximate_share": 0.5,
        "approximate_agreement": 0.5,
    }


def test_files_are_read_as_magika_reads_them(tmp_path: Path) -> None:
    def ends(content: bytes) -> np.ndarray | None:
        path = tmp_path / "file"
        path.write_bytes(content)
        return protected._ends(str(path))

    found = ends(b"  \nhello there\n\t ")
    assert found is not None
    assert found.shape == (2048,)
    assert bytes(found[:14].astype(np.uint8)) == b"hello there\n\t "
    assert (found[14:2034] == 256).all()
    assert bytes(found[2034:].astype(np.uint8)) == b"  \nhello there"
    long = bytes(range(1, 251)) * 40
    found = ends(long)
    assert found is not None
    assert bytes(found[:1024].astype(np.uint8)) == long[:1024]
    assert bytes(found[1024:].astype(np.uint8)) == long[-1024:]
    assert ends(b"short") is None
    assert ends(b" " * 100) is None
    many = tmp_path / "many"
    many.mkdir()
    for number in range(5):
        (many / f"{number % 2}.txt").write_text(f"file number {number % 2}")
    assert protected._files([many]).shape == (2, 2048)


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["nothing"], "invalid choice"),
        (["lite0"], "a clone of github.com/thunderInfy/imagenette"),
        (["resnet"], "CIFAR-10's train.npz"),
    ],
)
def test_what_a_row_lacks_is_told(
    words: list[str], told: str, tmp_path: Path, call_benchmarks: Command
) -> None:
    outcome = call_benchmarks("protected", *words, "--out", tmp_path / "out")
    assert outcome.code == 2
    assert told in outcome.err


def test_a_protections_own_inputs_are_those_it_was_not_made_with() -> None:
    inputs = Inputs({"x": np.arange(300.0)[:, None]}, {})
    settings = {"inputs": inputs.digest(), "seed": 3}
    found = straggling.unseen(inputs, {"settings": settings})
    assert set(found) == set(split(300, 3).test)
    more = Inputs({"x": np.arange(301.0)[:, None]}, {})  # nobody knows which of these are new
    with pytest.raises(UserError, match="--inputs"):
        straggling.unseen(more, {"settings": settings})
