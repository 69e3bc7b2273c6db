"""The command from end to end: what it leaves and what it refuses."""

from __future__ import annotations

import json
import re
import shutil
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from onnx import TensorProto, helper

from codedinvnet.checkpoint import load_checkpoint, module_tensors, save_checkpoint
from codedinvnet.codes.rules import BACKUP
from codedinvnet.config import PartSettings
from codedinvnet.data.load import sample_images
from codedinvnet.engines import ENGINES, ONNX_RUNTIME
from codedinvnet.errors import UserError
from codedinvnet.models import open_model, runtime
from codedinvnet.models.base import TensorSpec
from codedinvnet.models.graph import Unsupported
from codedinvnet.protect import distil, load_protection, parts
from codedinvnet.protect.folder import (
    DESCRIPTION,
    EXPORTS,
    PARTS,
    WEIGHTS,
    export_part,
    load_part,
    open_backup,
    save_part,
)
from codedinvnet.protect.inputs import Inputs
from codedinvnet.protect.students import Shape, VectorStudent
from codedinvnet.protect.teacher import teacher_scores
from codedinvnet.trust.calibration import FILE
from tests.conftest import Command
from tests.models.factories import Value, save_onnx, write_graph
from tests.protect import factories
from tests.protect.conftest import COUNT, PLACE, arguments, description, killed, queries
from tests.protect.factories import DAY, FEATURES

ROWS = ("small-backup", "code", "code-scores", "code-side", "equal-backup")
"""The rows of what is trained."""


def test_the_folder_is_whole(finished: Path) -> None:
    names = {DESCRIPTION, *PARTS.values(), *EXPORTS.values(), "calibration.safetensors", FILE}
    names.add("coverage.png")
    assert {path.name for path in finished.iterdir()} == names
    found = description(finished)
    rows = {row["method"]: row for row in found["table"]}
    assert list(rows) == [*ROWS, "own-backup", "approxifer", "nercc"]
    assert rows["own-backup"]["work"] == 0.4
    assert (rows["own-backup"]["k"], rows["own-backup"]["backup_workers"]) == (4, 2)
    assert "2 backup workers" in rows["own-backup"]["note"]
    assert rows["small-backup"]["work"] <= 1 / 4
    assert rows["small-backup"]["agreement"][0] > found["most_frequent"][0]
    for row in rows.values():
        assert row["accuracy"] == row["agreement"]  # the labels are the model's answers
    assert any("the model itself is right in 100.0%" in note for note in found["notes"])
    assert found["recommended"] in rows
    assert found["split"] == {"train": 240, "validation": 40, "calibration": 60, "test": 60}
    tensors, header = load_checkpoint(finished / "calibration.safetensors")
    assert header["methods"] == list(rows)
    assert tensors["small-backup.calibration.confidence"].shape == (60,)
    agrees = tensors["own-backup.test.agrees"].double().mean()
    assert float(agrees) == rows["own-backup"]["agreement"][0]


@pytest.mark.parametrize("method", [*ROWS, "own-backup", "approxifer", "nercc", None])
def test_a_missing_answer_is_made_up_for(finished: Path, method: str | None) -> None:
    model = open_model(f"{PLACE}:vectors")
    scheme = load_protection(str(finished), model, method)
    k = scheme.rules.k
    assert k == 4
    x = np.random.default_rng(5).random((k, FEATURES), np.float32)
    tasks = scheme.rules.tasks(k)
    outputs = {
        number: scheme.compute(number, torch.from_numpy(x[list(task.members)])[None]).output
        for number, task in tasks.items()
        if number != 1
    }
    found = scheme.decode(outputs, k)
    assert found[1].shape == (1, 3)
    if method == "own-backup":
        own = open_model(f"{PLACE}:smaller").run({"x": x})["output"]
        np.testing.assert_allclose(found[1][0], own[1], rtol=1e-5)
    if method == "small-backup":
        student = load_part(finished / WEIGHTS)
        with torch.inference_mode():
            assert torch.allclose(found[1], student(torch.from_numpy(x))[1:2], atol=1e-5)
        work = next(r["work"] for r in description(finished)["table"] if r["method"] == method)
        assert tasks[4].model == BACKUP
        assert tasks[4].cost == pytest.approx(4 * work)


def test_another_models_protection_is_refused(finished: Path) -> None:
    with pytest.raises(UserError, match="digest"):
        load_protection(finished, open_model(f"{PLACE}:images"))
    with pytest.raises(UserError, match="no method 'oracle'"):
        load_protection(finished, open_model(f"{PLACE}:vectors"), "oracle")
    with pytest.raises(UserError, match="no protection"):
        load_protection(finished.parent, open_model(f"{PLACE}:vectors"))


@pytest.mark.parametrize("method", ["small-backup", "own-backup"])
def test_a_backup_leaves_the_model_its_threads(finished: Path, method: str) -> None:
    before = torch.get_num_threads()
    try:
        model = open_model(f"{PLACE}:vectors", threads=3)
        load_protection(finished, model, method)
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)


def test_a_bundle_needs_no_protection(call: Command, tmp_path: Path) -> None:
    words = ("--inputs", str(queries(tmp_path)), "--out", str(tmp_path / "out"))
    outcome = call("protect", "mnist", *words)
    assert outcome.code == 2
    assert "mnist is a bundle" in outcome.err


def test_beside_a_servers_model_there_are_the_threads_that_were_asked_for(
    call: Command, tmp_path: Path
) -> None:
    words = ("--inputs", str(queries(tmp_path)), "--out", str(tmp_path / "out"), "--threads", "3")
    before = torch.get_num_threads()
    try:
        assert call("protect", "http://127.0.0.1:9/v2/models/m", *words).code == 2
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)


def test_a_backup_that_costs_as_much_as_the_model_is_no_backup(
    call: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    slower = save_onnx(factories.slower, tmp_path / "slower.onnx")
    monkeypatch.chdir(tmp_path)
    more = ("--methods", "approxifer", "--backup", slower.name)
    outcome = call(*arguments("vectors", queries(tmp_path), tmp_path / "out", *more))
    assert outcome.code == 0, outcome.err
    found = description(tmp_path / "out")
    assert found["own_backup"]["source"] == str(slower)  # it is opened from elsewhere
    assert found["table"][0]["agreement"][0] == 1.0
    assert found["recommended"] != "own-backup"
    with pytest.raises(UserError, match=r"costs 1\.00 of the model"):
        load_protection(tmp_path / "out", open_model(f"{PLACE}:vectors"), "own-backup")


def test_a_backup_may_be_a_bundle(
    call: Command, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def not_exported(*_: Any) -> None:  # it takes seconds
        raise Unsupported("not here")

    lacking = replace(ENGINES[ONNX_RUNTIME], needed=("no_such_module",))
    monkeypatch.setitem(ENGINES, ONNX_RUNTIME, lacking)
    monkeypatch.setattr(parts, "graph_of", not_exported)
    images = sample_images("mnist").images[:200].numpy()
    np.save(tmp_path / "x.npy", images)
    more = ("--methods", "small-backup", "--backup", "mnist")
    outcome = call(*arguments("digits", tmp_path / "x.npy", tmp_path / "out", *more))
    assert outcome.code == 0, outcome.err
    row = description(tmp_path / "out")["table"][1]
    assert (row["method"], row["work"], row["agreement"][0]) == ("own-backup", 0.5, 1.0)
    served = open_model(f"{PLACE}:digits")
    scheme = load_protection(tmp_path / "out", served, "own-backup")
    outputs = {
        number: scheme.compute(number, torch.from_numpy(images[list(task.members)])[None]).output
        for number, task in scheme.rules.tasks(4).items()
        if number != 1
    }
    wanted = served.run({"images": images[1:2]})["output"]
    np.testing.assert_allclose(scheme.decode(outputs, 4)[1], wanted, rtol=1e-4, atol=1e-4)


def test_a_backup_that_was_replaced_is_told(finished: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(finished, tmp_path / "copy")
    changed = description(copy)
    changed["own_backup"]["digest"] = "0" * 16
    (copy / DESCRIPTION).write_text(json.dumps(changed))
    with pytest.raises(UserError, match=r"smaller\.onnx is another file than .*copy was made with"):
        load_protection(copy, open_model(f"{PLACE}:vectors"), "own-backup")


def test_a_backup_of_other_inputs_is_refused(call: Command, tmp_path: Path) -> None:
    other = save_onnx(factories.other_inputs, tmp_path / "other.onnx")
    words = arguments("vectors", queries(tmp_path), tmp_path / "out", "--backup", str(other))
    outcome = call(*words)
    assert outcome.code == 2
    assert "error: --backup: " in outcome.err


@pytest.mark.parametrize("source", ["{}/mine.py:make", "http://127.0.0.1:9/v2/models/m", None])
def test_a_folder_of_somebodys_runs_no_code(
    finished: Path, tmp_path: Path, source: str | None
) -> None:
    (tmp_path / "mine.py").write_text("from pathlib import Path\nPath(__file__ + '.ran').touch()\n")
    copy = shutil.copytree(finished, tmp_path / "copy")
    named = source and {"source": source.format(tmp_path)}
    changed = {**description(copy), "recommended": "own-backup", "own_backup": named}
    (copy / DESCRIPTION).write_text(json.dumps(changed))
    with pytest.raises(UserError, match=r"own backup|as its backup"):
        load_protection(copy, open_model(f"{PLACE}:vectors"))
    with pytest.raises(UserError, match=r"own backup|as its backup"):  # the gateway's workers
        open_backup(copy, changed, "own-backup", "logits")
    assert not (tmp_path / "mine.py.ran").exists()


@pytest.mark.parametrize(
    ("key", "value", "told"),
    [
        ("model", None, r"missing key 'model'"),
        ("model", {"digest": "0af1"}, r"missing key 'model\.(source|scores)'"),
        ("table", [{"method": "small-backup"}], r"missing key 'table\.0\.(work|k)'"),
        ("recommended", 3, "recommended: "),
    ],
)
def test_a_damaged_description_is_told(
    finished: Path, tmp_path: Path, key: str, value: object, told: str
) -> None:
    changed = {**description(finished), key: value}
    if value is None:
        del changed[key]
    (tmp_path / DESCRIPTION).write_text(json.dumps(changed))
    with pytest.raises(UserError, match=rf"protection\.json is damaged: {told}"):
        load_protection(tmp_path, open_model(f"{PLACE}:vectors"))


def test_what_recommends_nothing_serves_nothing(finished: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(finished, copy)
    changed = {**description(copy), "recommended": None, "reason": "nothing helps"}
    (copy / DESCRIPTION).write_text(json.dumps(changed))
    with pytest.raises(UserError, match="nothing helps"):
        load_protection(copy, open_model(f"{PLACE}:vectors"))


@pytest.mark.usefixtures("exported")
def test_images_and_tokens_are_protected(call: Command, tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    np.save(tmp_path / "x.npy", generator.integers(0, 256, (COUNT, 16, 16, 3), dtype=np.uint8))
    np.save(tmp_path / "ids.npy", generator.integers(0, 9, (COUNT, 20)))
    outcome = call(*arguments("images", tmp_path / "x.npy", tmp_path / "a"))
    assert outcome.code == 0, outcome.err
    assert "recommended: " in outcome.out
    assert description(tmp_path / "a")["settings"]["kind"] == "images"
    outcome = call(*arguments("tokens", tmp_path / "ids.npy", tmp_path / "b"))
    assert outcome.code == 0, outcome.err
    assert "approxifer is left out: " in outcome.out
    assert [row["method"] for row in description(tmp_path / "b")["table"]] == ["small-backup"]
    scheme = load_protection(tmp_path / "b", open_model(f"{PLACE}:tokens"), "small-backup")
    scores = scheme.compute(4, torch.zeros(1, 4, 20)).output  # as floats, which a worker makes
    assert scores.view(4, 3).sum(1) == pytest.approx(1.0)  # probabilities, as the model's own


def test_images_are_shifted_if_the_model_does_not_mind(
    call: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    generator = np.random.default_rng(0)
    x = np.repeat(generator.integers(0, 256, (COUNT, 1, 1, 3), dtype=np.uint8), 256, 1)
    np.save(tmp_path / "x.npy", x.reshape(COUNT, 16, 16, 3))
    shifts: list[tuple[int, int]] = []

    def planned(stage: distil.DistilStage, *_: Any, settings: dict[str, Any], **__: Any) -> None:
        shifts.append((stage.lesson.shift, settings["shift"]))
        raise KeyboardInterrupt

    monkeypatch.setattr("codedinvnet.protect.parts.train_stage", planned)
    for model, more in {"colours": (), "images": (), "told": ("--shift", "1")}.items():
        source = "images" if more else model
        words = arguments(source, tmp_path / "x.npy", tmp_path / model, *more)
        assert call(*words, "--methods", "small-backup").code == 130
    assert shifts == [(2, 2), (0, 0), (1, 1)]


def test_a_small_backup_of_before_the_parts_of_an_image_is_read(tmp_path: Path) -> None:
    spec = TensorSpec("x", "FP32", (3, 16, 16))
    old, new = (Shape("images", 4, 3, (spec,), quarters=n).build().eval() for n in (1, 2))
    save_part(tmp_path / "new", new)
    x = torch.randn(2, 3, 16, 16)
    with torch.inference_mode():
        assert torch.equal(load_part(tmp_path / "new")(x), new(x))
    told = old.shape.as_json()
    del told["quarters"]
    save_checkpoint(tmp_path / "old", module_tensors({"part": old}), {"shape": told})
    with torch.inference_mode():
        assert torch.equal(load_part(tmp_path / "old")(x), old(x))


def test_a_machine_that_turns_out_slower_does_fewer_epochs(
    call: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(distil, "MOST_ROUNDS", 40)
    planned, validate = distil.plan, distil.DistilStage.validate

    def slow(stage: distil.DistilStage) -> Any:
        time.sleep(0.5)
        return validate(stage)

    def hopeful(
        make: Callable[[PartSettings], distil.BudgetStage], count: int, _: float, rates: Any
    ) -> PartSettings:
        return planned(make, count, 1e6, rates)

    monkeypatch.setattr("codedinvnet.protect.parts.plan", hopeful)
    monkeypatch.setattr(distil.DistilStage, "validate", slow)
    more = ("--methods", "small-backup", "--minutes", "0.05")
    outcome = call(*arguments("vectors", queries(tmp_path), tmp_path / "out", *more))
    assert outcome.code == 0, outcome.err
    epochs = re.findall(r"small backup epoch (\d+)/(\d+)", outcome.err)
    (_, first), (last, total) = epochs[0], epochs[-1]
    assert last == total
    assert int(total) <= 6 < int(first)


def test_asking_for_mirrored_images_takes_of_the_minutes(
    call: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    generator = np.random.default_rng(0)
    np.save(tmp_path / "x.npy", generator.integers(0, 256, (COUNT, 16, 16, 3), dtype=np.uint8))
    asking: list[float] = []
    planned: list[float] = []
    plan = distil.plan

    def slow(*words: Any, **more: Any) -> np.ndarray:
        asking.append(100.0)
        return teacher_scores(*words, **more)

    def noted(make: Any, count: int, seconds: float, rates: Any) -> PartSettings:
        planned.append(seconds)
        return plan(make, count, seconds, rates)

    clock = SimpleNamespace(monotonic=lambda: time.monotonic() + sum(asking))
    monkeypatch.setattr("codedinvnet.protect.parts.time", clock)
    monkeypatch.setattr("codedinvnet.protect.parts.teacher_scores", slow)
    monkeypatch.setattr("codedinvnet.protect.parts.plan", noted)
    monkeypatch.setattr("codedinvnet.protect.parts.train_stage", killed)
    words = arguments("colours", tmp_path / "x.npy", tmp_path / "out")  # within 300 seconds
    assert call(*words, "--methods", "small-backup").code == 130
    assert asking == [100.0]
    assert 100 < planned[0] <= 200


@pytest.mark.parametrize(
    ("model", "more", "message"),
    [
        ("vectors", ("--minutes", "0.000001"), "--minutes"),
        ("vectors", ("--methods", "magic"), "--methods"),
        ("vectors", ("--k", "1"), "k must be"),
        ("vectors", ("--k", "61"), "--k 61: of 400 inputs 60"),
        ("vectors", ("--backup", f"{PLACE}:smaller"), "--backup: "),
        ("vectors", ("--backup", "http://127.0.0.1:9/v2/models/m"), "--backup: "),
        ("vectors", ("--scores", "nothing"), "--scores"),
        ("at_random", (), "not deterministic"),
        ("constant", (), "class 0 to all inputs"),
        ("images", (), "shape"),
        ("images", ("--shift", "-1"), "--shift: images of 16x16 pixels are shifted by 0 to 15"),
        ("images", ("--shift", "16"), "--shift: images of 16x16 pixels"),
        ("vectors", ("--shift", "1"), "--shift: "),
        ("vectors", ("--methods", "nercc,approxifer,nercc"), "--methods: nercc is there twice"),
        ("vectors", ("--crop", "3", "--resize", "3"), "--resize, --crop: goes with a folder"),
    ],
)
def test_mistakes_are_told_in_one_line(
    model: str, more: tuple[str, ...], message: str, call: Command, tmp_path: Path
) -> None:
    outcome = call(*arguments(model, queries(tmp_path), tmp_path / "out", *more))
    assert outcome.code == 2
    line = next(line for line in outcome.err.splitlines() if line.startswith("error: "))
    assert message in line
    assert not (tmp_path / "out" / DESCRIPTION).exists()


def test_a_finished_protection_is_not_overwritten(finished: Path, call: Command) -> None:
    outcome = call(*arguments("vectors", finished.parent / "x.npy", finished))
    assert outcome.code == 2
    assert "holds a protection already" in outcome.err


def test_scores_are_divided_by_less_where_many_classes_would_look_alike() -> None:
    def temperature(classes: int, height: float) -> float:
        scores = np.zeros((3, classes), np.float32)
        scores[:, 0] = height
        return distil.Lesson(Inputs({}, {}), np.arange(3), np.arange(3), scores).temperature

    assert temperature(10, 1.0) == 1.0  # even then they are alike
    assert temperature(10, 4.0) == 2.0
    assert temperature(1000, 8.0) == 1.0
    assert temperature(1000, 30.0) == 2.0


def test_a_backup_is_served_without_onnx_runtime_as_well(
    finished: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = open_model(f"{PLACE}:vectors")
    x = torch.rand(1, 4, FEATURES)
    exported = load_protection(finished, model, "small-backup").compute(4, x).output
    lacking = replace(ENGINES[ONNX_RUNTIME], needed=("no_such_module",))
    monkeypatch.setitem(ENGINES, ONNX_RUNTIME, lacking)
    monkeypatch.setattr(runtime, "session", None)  # nobody may open one
    found = load_protection(finished, model, "small-backup").compute(4, x).output
    torch.testing.assert_close(found, exported, rtol=1e-4, atol=1e-4)


def test_nothing_is_left_of_an_export_that_gives_other_scores(tmp_path: Path) -> None:
    class Uneven(VectorStudent):
        """An exporter sees another network than PyTorch computes."""

        def forward(self, *inputs: torch.Tensor) -> torch.Tensor:
            found = super().forward(*inputs)
            return found if torch.compiler.is_exporting() else found + 1

    specs = (TensorSpec("x", "FP32", (FEATURES,)),)
    student = Uneven(Shape("vectors", 4, 3, specs)).eval()
    with pytest.raises(UserError, match="other scores"):
        export_part(tmp_path, "small-backup", student)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("exported")
def test_missing_values_are_protected(call: Command, tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    x = np.load(queries(tmp_path))
    x[generator.random(x.shape) < 0.1] = np.nan
    x[:, 0] = np.nan
    np.save(tmp_path / "gaps.npy", x)
    outcome = call(*arguments("gaps", tmp_path / "gaps.npy", tmp_path / "out"))
    assert outcome.code == 0, outcome.err
    assert description(tmp_path / "out")["exports"] == ["small-backup"]
    scheme = load_protection(tmp_path / "out", open_model(f"{PLACE}:gaps"), "small-backup")
    queried = torch.from_numpy(x[None, :4])
    answers = scheme.compute(4, queried).output
    assert answers.isfinite().all()
    with torch.inference_mode():
        wanted = load_part(tmp_path / "out" / WEIGHTS)(queried[0])
    torch.testing.assert_close(answers.view(4, 3), wanted, rtol=1e-4, atol=1e-4)


def test_large_integers_are_numbers_and_no_words(call: Command, tmp_path: Path) -> None:
    seconds = 1_700_000_000 + np.random.default_rng(0).integers(0, DAY, (COUNT, 4))
    np.save(tmp_path / "x.npy", seconds)
    outcome = call(*arguments("times", tmp_path / "x.npy", tmp_path / "out"))
    assert outcome.code == 0, outcome.err
    assert description(tmp_path / "out")["settings"]["kind"] == "vectors"


@pytest.mark.parametrize("highest", [-1, 50])
def test_negative_integers_are_numbers_and_no_words(
    highest: int, call: Command, tmp_path: Path
) -> None:
    np.save(tmp_path / "x.npy", np.random.default_rng(0).integers(-50, highest + 1, (COUNT, 4)))
    words = arguments("signed", tmp_path / "x.npy", tmp_path / "out", "--methods", "small-backup")
    outcome = call(*words)
    assert outcome.code == 0, outcome.err
    student = load_part(tmp_path / "out" / WEIGHTS)
    with torch.inference_mode():
        one, other = student(torch.tensor([[-50] * 4, [-1] * 4]))
    assert not torch.equal(one, other)


def test_the_notes_tell_of_inputs_that_repeat_others(call: Command, tmp_path: Path) -> None:
    once = np.load(queries(tmp_path))
    np.save(tmp_path / "x.npy", np.concatenate([once, np.repeat(once[:1], COUNT, axis=0)]))
    words = arguments("vectors", tmp_path / "x.npy", tmp_path / "out", "--methods", "approxifer")
    outcome = call(*words)
    assert outcome.code == 0, outcome.err
    notes = description(tmp_path / "out")["notes"]
    assert any(f"{COUNT} of {2 * COUNT} inputs (50.0 %) repeat others" in note for note in notes)


def test_texts_are_refused(call: Command, tmp_path: Path) -> None:
    values: list[Value] = [
        ("x", TensorProto.FLOAT, ["batch", 4]),
        ("word", TensorProto.STRING, ["batch", 1]),
    ]
    path = write_graph(
        tmp_path / "model.onnx",
        [helper.make_node("MatMul", ["x", "weights"], ["y"])],
        values,
        [("y", TensorProto.FLOAT, ["batch", 3])],
        {"weights": np.random.default_rng(0).normal(size=(4, 3)).astype(np.float32)},
    )
    x = np.random.default_rng(1).random((COUNT, 4), np.float32)
    np.savez(tmp_path / "x.npz", x=x, word=np.full((COUNT, 1), "a"))
    words = ("--inputs", str(tmp_path / "x.npz"), "--out", str(tmp_path / "out"), "--k", "4")
    outcome = call("protect", str(path), *words)
    assert outcome.code == 2
    (line,) = [line for line in outcome.err.splitlines() if line.startswith("error: ")]
    assert "texts" in line
