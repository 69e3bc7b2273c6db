"""`codedinvnet protect` from end to end, on models of a moment."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from codedinvnet.common.errors import UserError
from codedinvnet.models import open_model
from codedinvnet.protection import distil, run, teacher
from codedinvnet.protection.folder import DESCRIPTION, load_protection
from codedinvnet.protection.inputs import Inputs, split
from tests.conftest import Command
from tests.protection.conftest import COUNT, MADE, PLACE, arguments, description, queries


def images(folder: Path) -> Path:
    """Write images of one colour each, with some noise, in bytes."""
    generator = np.random.default_rng(0)
    colours = generator.random((COUNT, 1, 1, 3), np.float32)
    x = colours * generator.integers(0, 256, (COUNT, 16, 16, 3))
    np.savez(folder / "images.npz", images=x.astype(np.uint8))
    return folder / "images.npz"


@pytest.mark.nightly
def test_a_ladder_of_backups_is_trained_and_measured(call: Command, tmp_path: Path) -> None:
    words = ["protect", f"{PLACE}:residual", "--inputs", str(images(tmp_path))]
    outcome = call(*words, "--out", tmp_path / "out", "--minutes", "1", "--task", "classify")
    found = description(tmp_path / "out")
    assert outcome.code == (3 if found["recommended"] is None else 0), outcome.err
    assert {row["method"].rpartition("-")[2] for row in found["table"]} <= {"0.1", "0.25", "0.45"}
    assert len(found["table"]) >= 1
    for row in found["table"]:
        assert row["work"] == pytest.approx(row["ms"][0] / row["model_ms"][0])
        low, high = row["agreement"][1:]
        assert 0 <= low <= row["agreement"][0] <= high <= 1
        assert (tmp_path / "out" / f"{row['method']}.onnx").is_file()
        assert f"| {row['method']} |" in outcome.out
    (trials,) = (note for note in found["notes"] if "after trials" in note)
    assert "fresh-" in trials
    assert any("no smaller-images" in note for note in found["notes"])
    scores = {name: float(score) for name, score in re.findall(r"(\S+) ([\d.]+) %", trials)}
    for row in found["table"]:
        size = row["method"].rpartition("-")[2]
        best = max(score for name, score in scores.items() if name.endswith(f"-{size}"))
        assert scores[row["method"]] == best, "of each size the best of the trials is kept"
    assert not (tmp_path / "out" / run.WORK).exists()


def test_a_killed_run_goes_on_as_if_it_had_not_been(
    call: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs = queries(tmp_path)
    words = {name: arguments("vectors", inputs, tmp_path / name) for name in ("whole", "killed")}
    monkeypatch.setattr(distil.Distillation, "replan", lambda stage, *_: stage.part.epochs)
    assert call(*words["whole"]).code in MADE
    validate, asked = distil.Distillation.validate, 0

    def fourth(stage: distil.Distillation) -> Any:
        nonlocal asked
        asked += 1
        if asked == 4:
            raise KeyboardInterrupt
        return validate(stage)

    with monkeypatch.context() as changed:
        changed.setattr(distil.Distillation, "validate", fourth)
        outcome = call(*words["killed"])
    assert outcome.code == 130
    assert "the same command goes on" in outcome.err
    assert not (tmp_path / "killed" / DESCRIPTION).exists()
    changed_seed = call(*words["killed"], "--seed", "1")
    assert changed_seed.code == 2
    assert "seed 0 -> 1" in changed_seed.err
    assert call(*words["killed"]).code in MADE
    one, other = (description(tmp_path / name)["table"][0] for name in words)
    assert one["method"] == other["method"]
    backups = [open_model(tmp_path / name / f"{one['method']}.onnx") for name in words]
    batch = {"x": np.load(inputs)}
    first, second = (backup.run(batch)["output"] for backup in backups)
    np.testing.assert_allclose(first, second, atol=1e-5)


def test_more_minutes_help_after_too_few(call: Command, tmp_path: Path) -> None:
    words = arguments("vectors", queries(tmp_path), tmp_path / "out")
    few = call(*words, "--minutes", "0.001")
    assert few.code == 2
    assert "give more minutes" in few.err
    assert call(*words).code in MADE


@pytest.mark.parametrize(("name", "shift"), [("colours", 4), ("sides", 0)])
def test_images_are_changed_in_training_as_the_model_tolerates(
    name: str, shift: int, tmp_path: Path
) -> None:
    model = open_model(f"{PLACE}:{name}")
    generator = np.random.default_rng(0)
    x = generator.random((300, 3, 32, 32), np.float32) * generator.random((300, 3, 1, 1))
    if name == "sides":
        x = x / 8 + (np.arange(32) == generator.integers(13, 19, (300, 1, 1, 1)))
    inputs = Inputs({"x": x.astype(np.float32)}, model.signature.inputs)
    asked = teacher.ask(model, inputs, split(300, 0), tmp_path, 5.0, task="classify")
    assert asked.largest_shift() == shift
    lesson = teacher.Lesson(asked, [(True, False), (False, True)])
    rows, plain = asked.rows.train, inputs.arrays["x"]
    mirrored, pasted = (lesson.batch(rows, np.full(len(rows), way))["x"] for way in (1, 2))
    np.testing.assert_array_equal(mirrored, plain[rows][:, :, :, ::-1])
    differs = (pasted != plain[rows]).any(1).mean((1, 2))
    assert 0.1 < differs.mean() < differs.max() <= 0.6
    assert lesson.weights(False).tolist() == [0.5, 0.5, 0.0]
    assert lesson.weights(True).tolist() == [0.25, 0.25, 0.5]
    for way, images in enumerate((mirrored, pasted), 1):
        wanted = model.run({"x": images})[model.signature.outputs[0].name]
        np.testing.assert_array_equal(lesson.targets[way, rows].argmax(1), wanted.argmax(1))


def test_a_model_that_nothing_outruns_is_better_copied(
    call: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run, "_timed", lambda *_: 0.9)
    out = tmp_path / "out"
    outcome = call(*arguments("vectors", queries(tmp_path), out))
    assert outcome.code == 3
    assert "no mlp: the quickest takes 0.90 of the model's time" in outcome.out
    assert "recommended: none: no backup takes at most 0.5 of the model's time" in outcome.out
    with pytest.raises(UserError, match=r"recommends no backup.*use hedging"):
        load_protection(out, open_model(f"{PLACE}:vectors"))
