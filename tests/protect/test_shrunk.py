"""The served model itself, on smaller images, as a student."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("onnx")

from codedinvnet.codes.equal_cost import count_macs
from codedinvnet.models import OpenModel, open_model
from codedinvnet.models.graph import Unsupported
from codedinvnet.protect import costs, load_protection
from codedinvnet.protect.folder import DESCRIPTION, WEIGHTS, load_part, save_part
from codedinvnet.protect.shrunk import graph_of, shrunk_shape
from codedinvnet.protect.students import Shape, ShrunkStudent
from tests.conftest import Command
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
    shape = shrunk_shape(full_shape(model), graph, work)
    student = shape.build()
    assert isinstance(student, ShrunkStudent)
    student.network.load_state_dict(graph.state_dict())
    whole = count_macs(lambda: model.run(queries(model, 1)))
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


def test_a_model_of_one_size_is_refused() -> None:
    model = open_model(f"{PLACE}:large_images")
    batch = {"x": np.zeros((2, 3, 64, 64), np.float32)}
    with pytest.raises(Unsupported, match="one size"):
        shrunk_shape(full_shape(model), graph_of(model, batch), 0.25)


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
