"""The served model itself, on smaller images, as a student."""

from __future__ import annotations

import json
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("onnx")

from onnx import helper, numpy_helper, save

from codedinvnet.codes.equal_cost import count_macs
from codedinvnet.models import OpenModel, open_model
from codedinvnet.models.graph import Unsupported
from codedinvnet.models.probe import probe_inputs
from codedinvnet.protect import costs, load_protection
from codedinvnet.protect.folder import DESCRIPTION, WEIGHTS, load_part, save_part
from codedinvnet.protect.shrunk import graph_of, shrunk_shape
from codedinvnet.protect.students import ImageStudent, Shape, ShrunkStudent
from codedinvnet.protect.teacher import scores_of
from tests.conftest import Command
from tests.models import factories
from tests.protect.conftest import PLACE, arguments


def squares(count: int, *, last: bool) -> np.ndarray:
    """Return images of coarse squares, of which smaller images show the same."""
    coarse = np.random.default_rng(3).integers(0, 256, (count, 3, 6, 6), dtype=np.uint8)
    images = coarse.repeat(16, 2).repeat(16, 3)
    return np.ascontiguousarray(images.transpose(0, 2, 3, 1) if last else images)


def full_shape(model: OpenModel) -> Shape:
    (output,) = model.signature.outputs
    return Shape("images", 4, int(output.shape[0]), model.signature.inputs)


def queries(model: OpenModel, count: int) -> dict[str, np.ndarray]:
    (spec,) = model.signature.inputs
    return {spec.name: squares(count, last=spec.shape[-1] == 3).astype(np.float32)}


@pytest.mark.parametrize("name", ["picture", "likely_picture"])
@pytest.mark.parametrize("work", [0.1, 0.3, 1.0])
def test_it_costs_no_more_than_it_may(name: str, work: float, tmp_path: Path) -> None:
    model = open_model(f"{PLACE}:{name}")
    batch = queries(model, 5)
    graph = graph_of(model, batch)
    whole = count_macs(lambda: model.run(queries(model, 1)))
    shape = shrunk_shape(full_shape(model), graph, int(work * whole))
    student = shape.build()
    assert isinstance(student, ShrunkStudent)
    student.network.load_state_dict(graph.state_dict())
    assert 0.5 * work < costs.student_macs(student.eval()) / whole <= work
    save_part(tmp_path / WEIGHTS, student)
    x = torch.from_numpy(next(iter(batch.values())))
    with torch.inference_mode():
        found = student(x)
        assert torch.equal(load_part(tmp_path / WEIGHTS)(x), found)
    if work == 1.0:  # whole images: it is the model
        (wanted,) = model.run(batch).values()
        answers = found.softmax(1) if name == "likely_picture" else found
        np.testing.assert_allclose(answers, wanted, rtol=1e-3, atol=1e-4)


def test_the_graph_of_a_file_with_its_weights_behind_links(tmp_path: Path) -> None:
    model = open_model(factories.linked_onnx(factories.mlp, tmp_path, "blobs/bbb"))
    batch = probe_inputs(model.signature.inputs)
    (array,) = batch.values()
    with torch.inference_mode():
        found = graph_of(model, batch)(torch.from_numpy(array)).softmax(1).numpy()
    np.testing.assert_allclose(found, model.run(batch)["logits"], rtol=1e-4)


def test_a_graph_whose_scores_are_not_finite_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """The served model knows what to do without a value."""
    model = open_model(f"{PLACE}:picture")
    batch = queries(model, 2)
    batch[model.signature.inputs[0].name][0] = np.nan
    monkeypatch.setattr(
        "codedinvnet.protect.shrunk.scores_of", lambda *of: np.nan_to_num(scores_of(*of))
    )
    with pytest.raises(Unsupported, match="other scores here"):
        graph_of(model, batch)


def test_a_model_of_one_size_is_refused() -> None:
    model = open_model(f"{PLACE}:large_images")
    batch = {"x": np.zeros((2, 3, 64, 64), np.float32)}
    with pytest.raises(Unsupported, match="one size"):
        shrunk_shape(full_shape(model), graph_of(model, batch), 250_000)


def test_neither_side_gets_too_small() -> None:
    model = open_model(f"{PLACE}:picture")
    (spec,) = model.signature.inputs
    full = replace(full_shape(model), inputs=(replace(spec, shape=(3, 96, 32)),))
    graph = graph_of(model, queries(model, 2))
    whole = costs.student_macs(replace(full, graph=graph.described, size=(96, 32)).build().eval())
    assert shrunk_shape(full, graph, whole).size == (96, 32)
    with pytest.raises(Unsupported, match="24 pixels a side"):
        shrunk_shape(full, graph, whole // 3)


@pytest.mark.parametrize("name", ["picture", "likely_picture"])
def test_it_is_chosen_where_it_agrees_more_often(call: Command, tmp_path: Path, name: str) -> None:
    np.save(tmp_path / "x.npy", squares(400, last=name == "likely_picture"))
    options = ("--scale", "1", "--methods", "small-backup", "--no-flip")
    outcome = call(*arguments(name, tmp_path / "x.npy", tmp_path / "out", *options))
    assert outcome.code == 0, outcome.err
    found: dict[str, Any] = json.loads((tmp_path / "out" / DESCRIPTION).read_text())
    (row,) = found["table"]
    assert row["work"] <= 1 / 4
    assert row["agreement"][0] > 0.8
    assert any("smaller images" in note for note in found["notes"])
    assert isinstance(load_part(tmp_path / "out" / WEIGHTS), ShrunkStudent)
    model = open_model(f"{PLACE}:{name}")
    scheme = load_protection(tmp_path / "out", model)
    batch = queries(model, 4)
    (x,) = batch.values()
    scores = scheme.compute(4, torch.from_numpy(x)[None]).output.view(4, -1)
    (wanted,) = model.run(batch).values()
    assert (scores.argmax(1).numpy() == wanted.argmax(1)).mean() >= 0.75
    if name == "likely_picture":
        assert scores.sum(1) == pytest.approx(1.0)


def test_with_more_minutes_both_are_tried_anew(
    call: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = SimpleNamespace(monotonic=lambda: time.monotonic() + 1000)
    monkeypatch.setattr("codedinvnet.protect.parts.time", clock)
    np.save(tmp_path / "x.npy", squares(400, last=False))
    options = ("--scale", "1", "--methods", "small-backup", "--no-flip")
    words = arguments("picture", tmp_path / "x.npy", tmp_path / "out", *options)
    assert call(*words).code == 2  # within 300 seconds
    outcome = call(*words, "--minutes", "30")
    assert outcome.code == 0, outcome.err
    assert isinstance(load_part(tmp_path / "out" / WEIGHTS), ShrunkStudent)


def test_a_fresh_network_is_taken_where_the_models_training_diverges(
    call: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ShrunkStudent, "rates", {"learning_rate": 1e30})
    np.save(tmp_path / "x.npy", squares(400, last=False))
    options = ("--scale", "1", "--methods", "small-backup", "--no-flip")
    outcome = call(*arguments("picture", tmp_path / "x.npy", tmp_path / "out", *options))
    assert outcome.code == 0, outcome.err
    found = json.loads((tmp_path / "out" / DESCRIPTION).read_text())
    assert any("the loss is not finite" in note for note in found["notes"])
    assert isinstance(load_part(tmp_path / "out" / WEIGHTS), ImageStudent)


def test_what_pytorch_cannot_compute_is_refused(tmp_path: Path) -> None:
    """ONNX joins integers as it joins tensors; here they are lists."""
    nodes = [
        helper.make_node("GlobalAveragePool", ["x"], ["means"]),
        helper.make_node("Concat", ["any", "three"], ["sizes"], axis=0),
        helper.make_node("Reshape", ["means", "sizes"], ["y"]),
    ]
    shapes: dict[str, list[int | str | None]] = {"x": ["batch", 3, 32, 32], "y": ["batch", 3]}
    x, y = (helper.make_tensor_value_info(n, 1, shape) for n, shape in shapes.items())
    sizes = {"any": -1, "three": 3}
    held = [numpy_helper.from_array(np.array([size]), name) for name, size in sizes.items()]
    content = helper.make_model(
        helper.make_graph(nodes, "graph", [x], [y], held),
        opset_imports=[helper.make_opsetid("", 20)],
        ir_version=9,
    )
    save(content, tmp_path / "model.onnx")
    model = open_model(tmp_path / "model.onnx", scores="y:logits")
    with pytest.raises(Unsupported, match="cannot be computed here"):
        graph_of(model, {"x": np.random.default_rng(0).random((4, 3, 32, 32), np.float32)})
