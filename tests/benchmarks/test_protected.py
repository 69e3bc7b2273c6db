"""The benchmarks of protected models: what they read, and one short run."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from benchmarks import protected, protected_serving
from codedinvnet.common.grid import read_rows
from codedinvnet.protect import distil
from tests.conftest import Command
from tests.models.factories import save_onnx
from tests.protect.factories import FEATURES, vectors


def test_a_model_is_protected_and_served(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distil, "MOST_ROUNDS", 60)
    monkeypatch.setattr(protected, "RESULTS", tmp_path)
    monkeypatch.setattr(protected, "SERVING", tmp_path / "serving.jsonl")
    monkeypatch.setattr(protected_serving, "QUERIES", 60)
    monkeypatch.setattr(protected_serving, "STRAGGLERS", ("none",))
    monkeypatch.setattr(protected_serving, "ARMS", {"auto": "auto"})

    def make(folder: Path, _: Path | None) -> Path:
        save_onnx(vectors, folder / "model.onnx")
        x = np.random.default_rng(0).random((1200, FEATURES), np.float32)
        np.save(folder / "inputs.npy", x)
        return folder / "inputs.npy"

    recipe = protected.Recipe(make, ("--work", "0.5", "--k", "3"))
    monkeypatch.setattr(protected, "RECIPES", {"own": recipe})
    report = protected.run("own", tmp_path / "out", None, 5.0, serve=True)
    assert (tmp_path / "own.json").is_file()
    assert "| own | 600 |" in report["table"]
    assert report["table"] == protected.run(None, None, None, 5.0)["table"]
    (row,) = read_rows(tmp_path / "serving.jsonl", "protected-serving")
    assert row["error"] is None
    assert row["direct_equal"] == row["direct"] > 30
    assert "| own | none | auto |" in report["table"]


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
    ("words", "why"),
    [
        (["nothing"], "invalid choice"),
        (["lite0", "--out", "x"], "a clone of github.com/thunderInfy/imagenette"),
        (["resnet56", "--out", "x"], "CIFAR-10's train.npz"),
        (["resnet56"], "--out: name a folder"),
    ],
)
def test_what_a_row_lacks_is_why(
    words: list[str],
    why: str,
    call_benchmarks: Command,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    outcome = call_benchmarks("protected", *words)
    assert outcome.code == 2
    assert why in outcome.err
