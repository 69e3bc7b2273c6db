"""Multiply-adds of models of all kinds, and times."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
import torch.nn.functional as F
from onnx import TensorProto, helper
from torch import Tensor, nn

from codedinvnet.codes.equal_cost import count_macs
from codedinvnet.common.errors import UserError
from codedinvnet.models import open_model
from codedinvnet.protect import costs
from tests.models import factories as models
from tests.models.factories import made
from tests.protect.factories import transformer


class Padded(nn.Module):
    """Has a padding that PyTorch's classic exporter computes by constant nodes."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 8, 3, 1, 1), nn.Conv2d(16, 4, 3, 2, 1)

    def forward(self, images: Tensor) -> Tensor:
        h = self.first(images)
        h = F.pad(h[:, :, ::2, ::2], (0, 0, 0, 0, 4, 4))
        scores: Tensor = self.second(h).flatten(1)[:, :10]
        return scores


@pytest.mark.parametrize("factory", [models.resnet, transformer])
def test_models_cost_what_their_modules_do(factory: Callable[[], Any], tmp_path: Path) -> None:
    module, (example, *_) = made(factory)
    wanted = count_macs(lambda: module.train()(example[:1]))  # fast paths have no formulas
    model = open_model(models.linked_onnx(factory, tmp_path, "blobs/weights"))  # as hubs have it
    (spec,) = model.signature.inputs
    batch = {spec.name: np.zeros((2, *spec.shape), np.float32)}
    one = {spec.name: batch[spec.name][:1]}
    cost = costs.model_cost(model, one, lambda: costs.as_onnx(model, batch))
    assert cost.macs == wanted
    assert cost.share(0.5) == wanted // 2
    assert 0 < cost.ms.low <= cost.ms.value <= cost.ms.high


def test_a_classic_export_is_counted_through_its_constant_nodes(tmp_path: Path) -> None:
    path = tmp_path / "classic.onnx"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            Padded().eval(),
            (torch.zeros(1, 3, 32, 32),),
            path,
            input_names=["images"],
            dynamic_axes={"images": {0: "batch"}},
            dynamo=False,
        )
    model, one = open_model(path), {"images": np.zeros((1, 3, 32, 32), np.float32)}
    wanted = 32 * 32 * 8 * 27 + 8 * 8 * 4 * 144
    assert costs.onnx_macs(costs.as_onnx(model, one), one) == wanted


def test_an_operator_whose_work_is_not_known_is_named(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["h"]),
        helper.make_node("Einsum", ["h", "w"], ["y"], equation="bi,ij->bj"),
    ]
    shape: models.Value = ("x", TensorProto.FLOAT, ["batch", 4])
    weights = {"w": np.eye(4, dtype=np.float32)}
    out: models.Value = ("y", TensorProto.FLOAT, ["batch", 4])
    path = models.write_graph(tmp_path / "einsum.onnx", nodes, [shape], [out], weights)
    with pytest.raises(UserError, match="operator Einsum"):
        costs.onnx_macs(onnx.load(path), {"x": np.zeros((1, 4), np.float32)})
    words = onnx.load(models.words_onnx(tmp_path / "words.onnx"))
    one = {"tokens": np.zeros((1, models.TOKENS), np.int32)}
    assert costs.onnx_macs(words, one) == 4 * 6


def test_calls_are_timed_in_turn_when_warm() -> None:
    order = []

    def call(name: str, seconds: float) -> None:
        order.append(name)
        time.sleep(seconds)

    found = costs.milliseconds(
        {"slow": lambda: call("slow", 0.004), "quick": lambda: call("quick", 0)}
    )
    assert found["slow"].low > found["quick"].value
    assert order == ["slow", "quick"] * (costs.TIMED + 1)
