"""`codedinvnet protect` from end to end, on models of a moment."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from codedinvnet.models import open_model
from codedinvnet.models.base import TensorSpec
from codedinvnet.protect import distil, run, teacher
from codedinvnet.protect.folder import DESCRIPTION
from codedinvnet.protect.inputs import Inputs, split
from tests.conftest import Command
from tests.models.test_remote import server
from tests.protect.conftest import COUNT, PLACE, arguments, description, queries
from tests.protect.factories import FEATURES


def images(folder: Path) -> Path:
    """Write inputs of `residual`, in bytes."""
    generator = np.random.default_rng(0)
    colours = generator.random((COUNT, 1, 1, 3), np.float32)
    x = colours * generator.integers(0, 256, (COUNT, 16, 16, 3))
    np.savez(folder / "images.npz", images=x.astype(np.uint8))
    return folder / "images.npz"


def test_a_ladder_of_backups_is_trained_and_measured(call: Command, tmp_path: Path) -> None:
    words = ["protect", f"{PLACE}:residual", "--inputs", str(images(tmp_path))]
    outcome = call(*words, "--out", tmp_path / "out", "--minutes", "1")
    assert outcome.code == 0, outcome.err
    found = description(tmp_path / "out")
    works = {row["method"].rpartition("-")[2] for row in found["table"]}
    assert works <= {"0.1", "0.25", "0.5"}
    assert len(found["table"]) >= 2
    for row in found["table"]:
        assert row["work"] <= float(row["method"].rpartition("-")[2])
        low, high = row["agreement"][1:]
        assert 0 <= low <= row["agreement"][0] <= high <= 1
        assert (tmp_path / "out" / f"{row['method']}.onnx").is_file()
    (trials,) = (note for note in found["notes"] if "after short trials" in note)
    for family in ("fresh", "fewer-blocks", "early-exit"):
        assert f"{family}-0.5 " in trials
    assert outcome.out.count("| fresh-") + outcome.out.count("| fewer") > 0
    assert not (tmp_path / "out" / run.WORK).exists()


def test_a_killed_run_goes_on_as_if_it_had_not_been(
    call: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs = queries(tmp_path)
    words = {name: arguments("vectors", inputs, tmp_path / name) for name in ("whole", "killed")}
    monkeypatch.setattr(distil.Distillation, "replan", lambda stage, *_: stage.part.epochs)
    assert call(*words["whole"]).code == 0
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
    assert "seed 0 -> 1" in changed_seed.err or "inputs" in changed_seed.err
    assert call(*words["killed"]).code == 0
    one, other = (description(tmp_path / name)["table"][0] for name in words)
    assert one["method"] == other["method"]
    backups = [open_model(tmp_path / name / f"{one['method']}.onnx") for name in words]
    batch = {"x": np.load(inputs)}
    first, second = (backup.run(batch)["logits"] for backup in backups)
    np.testing.assert_allclose(first, second, atol=1e-5)


def test_a_servers_other_weights_are_noticed_when_a_run_goes_on(tmp_path: Path) -> None:
    specs = (TensorSpec("x", "FP32", (FEATURES,)),)
    inputs = Inputs({"x": np.load(queries(tmp_path))}, specs)
    model, other = (open_model(f"{PLACE}:{name}") for name in ("vectors", "smaller"))
    teacher.all_scores(model, inputs, tmp_path / "scores")
    again = teacher.all_scores(model, inputs, tmp_path / "scores")
    assert again.shape == (COUNT, 3)
    with pytest.raises(Exception, match="differ from those kept"):
        teacher.all_scores(other, inputs, tmp_path / "scores")


@pytest.mark.parametrize(("name", "keeps"), [("colours", True), ("sides", False)])
def test_images_are_changed_in_training_as_the_model_tolerates(
    name: str, keeps: bool, tmp_path: Path
) -> None:
    model = open_model(f"{PLACE}:{name}")
    generator = np.random.default_rng(0)
    x = generator.random((300, 3, 32, 32), np.float32) * generator.random(
        (300, 3, 1, 1), np.float32
    )
    inputs = Inputs({"x": x}, model.signature.inputs)
    asked = teacher.ask(model, inputs, split(300, 0), tmp_path, 5.0)
    assert (asked.agreement_when(asked.mirror) >= teacher.STEADY) == keeps
    assert asked.mirrored(0.0) is None  # no time
    logs = asked.mirrored(60.0)
    assert logs is not None
    wanted = model.run({"x": x[:, :, :, ::-1].copy()})[model.signature.outputs[0].name]
    np.testing.assert_array_equal(logs.argmax(1), wanted.argmax(1))


def test_a_model_that_a_server_has_is_protected(call: Command, tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", np.random.default_rng(0).random((COUNT, 3), np.float32))
    with server() as (url, _):
        words = arguments("", tmp_path / "x.npy", tmp_path / "out")
        words[1] = url
        outcome = call(*words)
    assert outcome.code == 0, outcome.err
    found = description(tmp_path / "out")
    assert found["model"]["macs"] is None
    assert any("sizes go by measured time" in note for note in found["notes"])


def test_a_bundle_is_protected(call: Command, tmp_path: Path, bundle_folder: Path) -> None:
    spec = open_model(bundle_folder).signature.inputs[0]
    shape = (COUNT, *spec.shape)
    x = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    np.save(tmp_path / "x.npy", x)
    words = arguments("", tmp_path / "x.npy", tmp_path / "out")
    words[1] = str(bundle_folder)
    outcome = call(*words)
    assert outcome.code == 0 or "answers class" in outcome.err, outcome.err


@pytest.mark.parametrize(
    ("model", "why"),
    [
        ("regression", "regressions and embeddings are not supported yet"),
        ("embedding", "looks like an embedding .* not supported yet: .* --scores"),
        ("tags", "independent labels .* --scores"),
        ("at_random", "not deterministic"),
        ("constant", "answers class 0 to all inputs"),
        ("nothing", "nothing"),
    ],
)
def test_models_that_cannot_be_learnt_from_are_refused(
    model: str, why: str, call: Command, tmp_path: Path
) -> None:
    outcome = call(*arguments(model, queries(tmp_path), tmp_path / "out"))
    assert outcome.code == 2
    lines = [line for line in outcome.err.splitlines() if line.startswith("error:")]
    assert len(lines) == 1
    assert re.search(why, lines[0]), lines[0]
    assert not (tmp_path / "out" / DESCRIPTION).exists()


@pytest.mark.parametrize(
    ("words", "why"),
    [
        (("--work", "1.5"), "--work: must lie between 0 and 1"),
        (("--minutes", "0"), "--minutes"),
        (("--minutes", "1e-9"), "--minutes"),
        (("--k", "300"), "--k 300"),
        (("--threads", "0"), "--threads"),
        (("--labels", "nowhere.txt"), "--labels"),
        (("--scores", "other"), "scores: "),
    ],
)
def test_options_that_do_not_fit_are_refused(
    words: tuple[str, ...], why: str, call: Command, tmp_path: Path
) -> None:
    outcome = call(*arguments("vectors", queries(tmp_path), tmp_path / "out", *words))
    assert outcome.code == 2
    assert why in outcome.err


def test_a_finished_protection_is_not_overwritten(
    finished: Path, call: Command, tmp_path: Path
) -> None:
    folder = shutil.copytree(finished, tmp_path / "out")
    before = description(folder)
    outcome = call(*arguments("vectors", queries(tmp_path), folder))
    assert outcome.code == 2
    assert "already holds a protection" in outcome.err
    assert description(folder) == before
