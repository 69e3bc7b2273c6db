"""The benchmarks of protected models: what they read, what they count, and one run of each."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks import protected, straggling
from benchmarks.command_line import main
from codedinvnet.errors import UserError
from codedinvnet.evaluation.client import Reply
from codedinvnet.evaluation.grid import read_rows
from codedinvnet.models.base import TensorSpec
from codedinvnet.protect import distil
from codedinvnet.protect.inputs import Inputs, split
from tests.conftest import Command
from tests.models.factories import save_onnx
from tests.protect.factories import FEATURES, vectors


@pytest.fixture
def made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a protected model; its row is beside it."""
    monkeypatch.setattr(distil, "MOST_ROUNDS", 60)
    monkeypatch.setattr(protected, "RESULTS", tmp_path)

    def make(folder: Path, _: Path | None) -> Path:
        save_onnx(vectors, folder / "model.onnx")
        x = np.random.default_rng(0).random((1200, FEATURES), np.float32)
        np.save(folder / "inputs.npy", x)
        return folder / "inputs.npy"

    recipe = protected.Recipe(make, ("--work", "0.5", "--k", "3"))
    monkeypatch.setattr(protected, "RECIPES", {"own": recipe})
    report = protected.run("own", tmp_path / "out", None, 5.0)
    (path,) = tmp_path.glob("own.json")
    assert path.is_file()
    assert "| own | 600 |" in report["table"]
    assert report["table"] == protected.run(None, None, None, 5.0)["table"]
    return tmp_path / "out"


def test_the_page_has_the_table_of_all_rows() -> None:
    page = Path("docs/results/protected.md").read_text()
    assert protected.table(protected.RESULTS) in page


def test_a_protected_model_is_served_under_stragglers(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(straggling, "ARMS", ("auto",))  # each takes a service of its own
    out = tmp_path / "rows.jsonl"
    words = ["straggling", str(made / "own-protection"), str(made / "model.onnx"), "--inputs"]
    words += [str(made / "inputs.npy"), "--requests", "60", "--load", "0.3", "--workers", "6"]
    words += ["--out", str(out), "--stragglers", "held", "--log", str(tmp_path / "log")]
    assert main([*words, "--method", "approxifer"]) == 2
    assert main(words) == 0
    (row,) = read_rows(out)
    assert row["policy"] == "auto"
    assert row["errors"] == 0
    assert row["agreement"] > 0.9
    assert row["p50_ms"] > 20  # the wait that stands for a machine of its own
    before = out.read_text()
    assert main(words) == 0  # nothing is done twice
    assert out.read_text() == before


def test_all_arms_meet_the_draws_of_their_straggler_model(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seeds: list[int] = []

    def serving(*_: Any, seed: int, **__: Any) -> None:
        seeds.append(seed)
        raise UserError("enough is known")

    monkeypatch.setattr(straggling, "serving", serving)
    words = ["straggling", str(made / "own-protection"), str(made / "model.onnx"), "--workers", "6"]
    words += ["--inputs", str(made / "inputs.npy"), "--stragglers", "held", "pareto"]
    words += ["--out", str(tmp_path / "rows.jsonl"), "--log", str(tmp_path / "log")]
    assert main(words) == 2
    held, pareto = seeds[:3], seeds[3:]
    assert len(set(held)) == len(set(pareto)) == 1
    assert held[0] != pareto[0]


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
        (["lite0", "--out", "x"], "a clone of github.com/thunderInfy/imagenette"),
        (["resnet56", "--out", "x"], "CIFAR-10's train.npz"),
        (["resnet56"], "--out: name a folder"),
    ],
)
def test_what_a_row_lacks_is_told(
    words: list[str],
    told: str,
    call_benchmarks: Command,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    outcome = call_benchmarks("protected", *words)
    assert outcome.code == 2
    assert told in outcome.err


def test_a_protections_own_inputs_are_those_it_was_not_made_with() -> None:
    specs = (TensorSpec("x", "FP32", (1,)),)
    inputs = Inputs({"x": np.arange(300.0)[:, None]}, specs)
    settings = {"inputs": inputs.digest(), "seed": 3}
    found = straggling.unseen(inputs, {"settings": settings})
    assert set(found) == set(split(300, 3).test)
    more = Inputs({"x": np.arange(301.0)[:, None]}, specs)  # which of these are new is unknown
    with pytest.raises(UserError, match="--inputs"):
        straggling.unseen(more, {"settings": settings})
