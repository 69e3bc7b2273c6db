"""Multiply-adds of ONNX files and of students, whose widths follow from them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from onnx import TensorProto, helper

from codedinvnet.codes.equal_cost import count_macs
from codedinvnet.models import open_model
from codedinvnet.models.base import TensorSpec
from codedinvnet.protect import costs
from codedinvnet.protect.students import Kind, Shape, kind_of, tensors
from tests.models import factories
from tests.models.factories import PLACE, made
from tests.protect import factories as protected

PROTECTED = "tests.protect.factories"
IMAGE = (TensorSpec("x", "FP32", (3, 32, 32)),)
LAST = (TensorSpec("x", "UINT8", (20, 30, 1)),)
VECTORS = (TensorSpec("x", "FP32", (16,)), TensorSpec("flag", "BOOL", (2, 2)))
TOKENS = (TensorSpec("ids", "INT32", (300,)), TensorSpec("mask", "BOOL", (300,)))


def test_onnx_files_cost_what_their_modules_do(tmp_path: Path) -> None:
    path = factories.save_onnx(factories.resnet, tmp_path / "resnet.onnx")
    module, (example, *_) = made(factories.resnet)
    wanted = count_macs(lambda: module(example[:1]))
    model = open_model(path)
    assert costs.model_macs(model, {"x": np.zeros((1, 3, 32, 32), np.float32)}) == wanted
    module, (example, *_) = made(factories.mlp)
    factory = open_model(f"{PLACE}:mlp")
    assert costs.model_macs(factory, {"input": np.zeros((1, 16), np.float32)}) == 16 * 8 + 8 * 3


RECURRENT = 20 * 4 * 16 * (8 + 16) + 16 * 3
ATTENTIVE = 2 * (20 * 8 * 32 + 2 * 20 * 20 * 8 + 2 * 20 * 8 * 32) + 8 * 3


@pytest.mark.parametrize(("name", "wanted"), [("recurrent", RECURRENT), ("attentive", ATTENTIVE)])
def test_layers_that_pytorch_fuses_cost_what_their_products_do(name: str, wanted: int) -> None:
    batch = {"ids": np.zeros((1, 20), np.int64)}
    assert costs.model_macs(open_model(f"{PROTECTED}:{name}"), batch) == wanted


@pytest.mark.parametrize("name", ["custom", "bilinear", "chosen"])
def test_what_pytorch_has_no_formula_for_is_not_guessed(name: str) -> None:
    batch = {"x": np.ones((1, protected.FEATURES), np.float32)}
    assert costs.model_macs(open_model(f"{PROTECTED}:{name}"), batch) is None


def test_products_by_hand(tmp_path: Path) -> None:
    path = factories.words_onnx(tmp_path / "words.onnx")
    assert costs.onnx_macs(path, {"tokens": (1, factories.TOKENS)}) == 4 * 6


def test_what_is_not_counted_is_not_guessed(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["h"]),
        helper.make_node("Einsum", ["h", "w"], ["y"], equation="bi,ij->bj"),
    ]
    shape: factories.Value = ("x", TensorProto.FLOAT, ["batch", 4])
    path = factories.write_graph(
        tmp_path / "einsum.onnx",
        nodes,
        [shape],
        [("y", TensorProto.FLOAT, ["batch", 4])],
        {"w": np.eye(4, dtype=np.float32)},
    )
    assert costs.onnx_macs(path, {"x": (1, 4)}) is None


@pytest.mark.parametrize(
    ("inputs", "kind"),
    [(IMAGE, "images"), (LAST, "images"), (VECTORS, "vectors"), (TOKENS, "tokens")],
)
def test_students_are_as_wide_as_they_may_cost(inputs: tuple[TensorSpec, ...], kind: Kind) -> None:
    assert kind_of(inputs) == kind
    words = (50,) * len(inputs) if kind == "tokens" else ()

    def shape(width: int) -> Shape:
        return Shape(kind, width, 7, inputs, words)

    budget = 400_000 if kind != "vectors" else 1000
    width = costs.width_by_macs(shape, budget)
    assert width > 1
    student = shape(width).build().eval()
    assert costs.student_macs(student) <= budget
    assert costs.student_macs(shape(width + 1).build().eval()) > budget
    batch = {spec.name: np.ones((5, *spec.shape), np.float32) for spec in inputs}
    with torch.inference_mode():
        assert student(*tensors(student.shape, batch)).shape == (5, 7)


@pytest.mark.timeout(60)
def test_of_a_large_model_of_vectors_a_student_is_found_that_has_room_in_memory() -> None:
    spectrogram = (TensorSpec("x", "FP32", (80, 3000)),)

    def shape(width: int) -> Shape:
        return Shape("vectors", width, 10, spectrogram)

    width = costs.width_by_macs(shape, 10**9)
    assert width >= 100
    assert 80 * 3000 * width <= costs.MOST_WEIGHTS


def test_where_time_decides_a_student_that_is_free_is_wide() -> None:
    def shape(width: int) -> Shape:
        return Shape("vectors", width, 3, VECTORS[:1])

    batch = {"x": np.zeros((10, 16), np.float32)}
    assert costs.width_by_time(shape, batch, 1000.0) == costs.WIDTHS[-1]
    assert costs.width_by_time(shape, batch, 0.0) < costs.WIDTHS[-1]


def test_a_number_a_query_is_a_vector_of_one() -> None:
    specs = (TensorSpec("age", "FP32", ()), TensorSpec("income", "FP32", ()))
    assert kind_of(specs) == "vectors"
    student = Shape("vectors", 4, 3, specs).build().eval()
    assert costs.student_macs(student) > 0
    assert student(torch.ones(5), torch.ones(5)).shape == (5, 3)
