"""What models of each kind are taken for, and when their answers agree."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper

from codedinvnet.common.errors import UserError
from codedinvnet.models import open_model
from codedinvnet.protection.inputs import Inputs, split
from codedinvnet.protection.tasks import TASKS, Embed, Labels, Regress, Task, is_classifier, task_of
from codedinvnet.protection.teacher import ask
from tests.protection.conftest import PLACE
from tests.protection.factories import FEATURES

GENERATOR = np.random.default_rng(0)
INPUTS = GENERATOR.random((400, FEATURES), np.float32)


@pytest.mark.parametrize("name", ["tags", "scores", "shares"])
def test_what_a_file_does_not_prove_is_asked_for(name: str, tmp_path: Path) -> None:
    """Three scores in 0..1, and rows that sum to 1 without a softmax, are no proof either."""
    model = open_model(f"{PLACE}:{name}")
    inputs = Inputs({"x": INPUTS}, model.signature.inputs)
    with pytest.raises(UserError, match="--task classify, labels, regress or embed"):
        ask(model, inputs, split(len(inputs), 0), tmp_path, 5.0)


def test_a_softmax_at_the_end_proves_a_classifier(tmp_path: Path) -> None:
    model = open_model(f"{PLACE}:likely")
    inputs = Inputs({"x": INPUTS}, model.signature.inputs)
    teacher = ask(model, inputs, split(len(inputs), 0), tmp_path, 5.0)
    assert teacher.task.name == "classify"
    assert teacher.task.describe()["kind"] == "probabilities"


def ending_in(*operators: tuple[str, dict[str, Any]]) -> onnx.ModelProto:
    """Return a graph from x to y through operators."""
    names = ["x", *(f"h{i}" for i in range(len(operators) - 1)), "y"]
    nodes = [
        helper.make_node(operator, [before], [after], **attributes)
        for (operator, attributes), before, after in zip(
            operators, names[:-1], names[1:], strict=True
        )
    ]
    values = [helper.make_tensor_value_info(n, TensorProto.FLOAT, ["b", 4]) for n in ("x", "y")]
    return helper.make_model(helper.make_graph(nodes, "g", values[:1], values[1:]))


@pytest.mark.parametrize(
    ("operators", "proved"),
    [
        ([("Softmax", {"axis": -1})], True),
        ([("Relu", {}), ("LogSoftmax", {}), ("Identity", {})], True),
        ([("LinearClassifier", {}), ("Normalizer", {})], True),
        ([("TreeEnsembleClassifier", {})], True),
        ([("Softmax", {"axis": 0})], False),
        ([("Softmax", {"axis": -1}), ("Relu", {})], False),
        ([("Sigmoid", {})], False),
        ([("TreeEnsembleRegressor", {})], False),
    ],
)
def test_only_a_classifiers_operator_at_the_end_is_a_proof(
    operators: list[tuple[str, dict[str, Any]]], proved: bool
) -> None:
    assert is_classifier(ending_in(*operators), "y") == proved


def test_answers_agree_by_the_task() -> None:
    labels = Labels(2, "probabilities")
    served = np.array([[0.9, 0.1], [0.9, 0.6], [0.2, 0.4]])
    found = np.array([[0.6, 0.4], [0.9, 0.4], [0.4, 0.2]])
    assert labels.agree(found, served).tolist() == [True, False, True]
    regress = Regress.of(np.array([[0.0, 0.0], [1.0, 100.0]] * 50), "", "5%", None)
    assert regress.within == pytest.approx((0.05, 5.0))
    found = np.array([[0.04, 4.0], [0.04, 6.0], [-0.06, 0.0]])
    assert regress.agree(found, np.zeros((3, 2))).tolist() == [True, False, False]
    assert Regress.of(GENERATOR.random((9, 2)), "", "0.2", None).within == (0.2, 0.2)
    embed = Embed(2, 0.9)
    found = np.array([[2.0, 0.0], [1.0, 1.0], [0.0, 0.0]])
    assert embed.agree(found, np.array([[1.0, 0.1]] * 3)).tolist() == [True, False, False]


OUTPUTS: dict[str, tuple[Callable[[], np.ndarray], str | None]] = {
    "classify": (lambda: GENERATOR.normal(size=(500, 4)), None),
    "labels": (lambda: GENERATOR.normal(size=(500, 4)), None),
    "regress": (lambda: GENERATOR.normal(3, [1, 10], size=(500, 2)), "10%"),
    "embed": (lambda: GENERATOR.normal(size=(500, 8)), None),
}


def made(name: str) -> tuple[Task, np.ndarray]:
    """Return a task with outputs of a model."""
    outputs, tolerance = OUTPUTS[name][0](), OUTPUTS[name][1]
    task: Task = TASKS[name].of(outputs, "", tolerance, None)
    return task, outputs


@pytest.mark.parametrize("name", OUTPUTS)
def test_a_student_learns_answers_and_how_sure_they_are(name: str) -> None:
    """Half of the inputs have a noise that no student can know, and are told as less sure."""
    task, outputs = made(name)
    assert task_of(task.describe()) == task
    torch.manual_seed(0)
    noisy = np.arange(len(outputs)) % 2 > 0
    wanted = np.where(noisy[:, None], GENERATOR.permutation(outputs), outputs)
    x = torch.from_numpy(np.concatenate([outputs / outputs.std(0), noisy[:, None]], 1)).float()
    student = torch.nn.Sequential(
        torch.nn.Linear(x.shape[1], 96), torch.nn.GELU(), torch.nn.Linear(96, task.columns)
    )
    optimizer = torch.optim.Adam(student.parameters(), 1e-2)
    targets = torch.from_numpy(task.targets(wanted))
    for _ in range(150):
        optimizer.zero_grad()
        task.loss(student(x), targets).backward()
        optimizer.step()
    with torch.inference_mode():
        values, sure = (found.numpy() for found in task.answer(student(x)))
    agrees = task.agree(values, outputs)
    assert agrees[~noisy].mean() > 0.85
    assert ((sure >= 0) & (sure <= 1)).all()
    assert sure[~noisy].mean() > sure[noisy].mean() + 0.1
