"""A smaller model of the user's own as the backup: how it is opened, and what it is given."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from onnx import TensorProto, helper

from codedinvnet.codes.backup import BackupCode
from codedinvnet.codes.base import Scheme
from codedinvnet.codes.rules import BACKUP, SERVED, AnswersAll
from codedinvnet.models import open_model
from codedinvnet.models.scores import ScoresOf
from codedinvnet.protect import load_protection
from codedinvnet.serving.workers.computing import BackupComputer, ModelComputer
from codedinvnet.serving.workers.result import OUTPUT, Computer
from tests.conftest import Command
from tests.models.factories import Value, write_graph
from tests.protect.conftest import COUNT, PLACE, description
from tests.protect.factories import FEATURES, LARGE


def averages(path: Path, *outputs: str) -> str:
    """Write a model of inputs of any length, with several outputs that may be scores."""
    nodes = [
        helper.make_node("ReduceMean", ["x", "axes"], ["m"], keepdims=1),
        helper.make_node("Mul", ["m", "slopes"], ["h"]),
        *(helper.make_node("Add", ["h", "levels"], [name]) for name in outputs),
    ]
    weights = {
        "slopes": np.array([[-8, 0, 8]], np.float32),
        "levels": np.array([[4, 0, -4]], np.float32),
    }
    values: list[Value] = [(name, TensorProto.FLOAT, ["batch", 3]) for name in outputs]
    inputs: list[Value] = [("x", TensorProto.FLOAT, ["batch", "length"])]
    return str(write_graph(path, nodes, inputs, values, {**weights, "axes": np.array([1])}))


@pytest.mark.parametrize("names", [("y", "more"), ("more", "other")])
def test_what_the_backup_leaves_open_is_what_was_told_of_the_model(
    names: tuple[str, ...], call: Command, tmp_path: Path
) -> None:
    """Shapes, and which output has the class scores: neither has an option of the backup's own."""
    model = averages(tmp_path / "model.onnx", "y", "z")
    backup = averages(tmp_path / "small.onnx", *names)
    x = np.random.default_rng(0).random((COUNT, 5), np.float32)
    np.save(tmp_path / "x.npy", x)
    words = ("--inputs", str(tmp_path / "x.npy"), "--out", str(tmp_path / "out"), "--k", "4")
    told = ("--input", "x:FP32:5", "--scores", "y", "--methods", "approxifer", "--backup", backup)
    outcome = call("protect", model, *words, *told)
    if "y" not in names:
        assert outcome.code == 2
        assert "is surely class scores, and none that is called 'y' as the model's" in outcome.err
        return
    assert outcome.code == 0, outcome.err
    rows = {row["method"]: row for row in description(tmp_path / "out")["table"]}
    assert rows["own-backup"]["agreement"][0] == 1.0
    served = open_model(model, inputs=("x:FP32:5",), scores="y")
    scheme = load_protection(tmp_path / "out", served, "own-backup")
    found = scheme.compute(4, torch.from_numpy(x[None, :4])).output
    np.testing.assert_allclose(found.view(4, 3), served.run({"x": x[:4]})["y"], atol=1e-5)


@pytest.mark.parametrize("kind", ["of a service", "of a gateway"])
def test_a_backup_gets_the_datatypes_that_it_was_measured_on(kind: str) -> None:
    model = open_model(f"{PLACE}:precise")
    x = LARGE + np.random.default_rng(0).random((4, FEATURES))  # the same for all in float32
    x.flags.writeable = False  # as what comes from a client
    scores = ScoresOf(model).eval()
    code = BackupCode(AnswersAll(4, BACKUP))
    scheme = Scheme("own-backup", code, {SERVED: scores, BACKUP: scores}, (FEATURES,))
    computer: Computer = ModelComputer(model, scheme)
    if kind == "of a gateway":
        computer = BackupComputer(scores, model.signature.inputs)
    found = computer.compute(4, {"x": x})[0][OUTPUT].reshape(4, 3)
    np.testing.assert_allclose(found, model.run({"x": x})["output"], rtol=1e-4, atol=1e-4)
