"""Models of every kind: the signature that is read, and answers that are the engine's own."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from safetensors.torch import save_model
from torch import Tensor, nn

from codedinvnet.common.errors import UserError
from codedinvnet.models import ModelSource, open_model
from codedinvnet.models.base import Scores, TensorSpec
from codedinvnet.models.probe import probe_inputs
from tests.models import factories
from tests.models.factories import PLACE, made

FACTORIES: dict[str, tuple[list[TensorSpec], list[TensorSpec], Scores | None]] = {
    "resnet": (
        [TensorSpec("x", "FP32", (3, 32, 32))],
        [TensorSpec("output", "FP32", (10,))],
        Scores("output", "logits"),
    ),
    "mlp": (
        [TensorSpec("input", "FP32", (16,))],
        [TensorSpec("output", "FP32", (3,))],
        Scores("output", "probabilities"),
    ),
    "words": (
        [TensorSpec("tokens", "INT32", (2048,))],
        [TensorSpec("logits", "FP32", (6,))],
        Scores("logits", "logits"),
    ),
    "pixels": (
        [TensorSpec("pixels", "UINT8", (3, 4, 4))],
        [TensorSpec("output", "FP32", (5,))],
        Scores("output", "logits"),
    ),
    "pair": (
        [TensorSpec("numbers", "FP32", (6,)), TensorSpec("mask", "BOOL", (6,))],
        [
            TensorSpec("label", "INT64", ()),
            TensorSpec("features", "FP64", (2, 1)),
            TensorSpec("scores_0", "FP32", (4,)),
            TensorSpec("scores_1", "FP32", (4,)),
        ],
        None,
    ),
    "model_output": (
        [TensorSpec("x", "FP32", (4,))],
        [TensorSpec(name, "FP32", (4,)) for name in ("logits", "hidden_0", "hidden_1")],
        None,
    ),
}


def flat(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, dict):
        value = value.values()
    return [tensor for inner in value if inner is not None for tensor in flat(inner)]


def pytorch(module: nn.Module, inputs: dict[str, np.ndarray]) -> list[np.ndarray]:
    """Return what PyTorch computes by itself."""
    with torch.inference_mode():
        found = module(*(torch.from_numpy(array) for array in inputs.values()))
    return [tensor.numpy() for tensor in flat(found)]


def check_equal(found: dict[str, np.ndarray], wanted: list[np.ndarray]) -> None:
    assert len(found) == len(wanted)
    for array, other in zip(found.values(), wanted, strict=True):
        assert array.dtype == other.dtype
        np.testing.assert_array_equal(array, other)


@pytest.mark.parametrize("name", FACTORIES)
def test_a_factory(name: str) -> None:
    model = open_model(f"{PLACE}:{name}")
    inputs, outputs, scores = FACTORIES[name]
    assert model.signature.inputs == tuple(inputs)
    assert model.signature.outputs == tuple(outputs)
    assert model.signature.scores == scores
    assert model.signature.max_batch is None
    assert model.signature.platform == "pytorch"
    queries = probe_inputs(model.signature.inputs)
    check_equal(model.run(queries), pytorch(made(getattr(factories, name))[0], queries))


def test_a_file_answers_as_the_network_that_it_was_exported_from(resnet_onnx: Path) -> None:
    queries = probe_inputs((TensorSpec("x", "FP32", (3, 32, 32)),))["x"]
    network, _ = made(factories.resnet)
    (wanted,) = pytorch(network, {"x": queries})
    file = open_model(resnet_onnx)
    assert file.signature.inputs == (TensorSpec("x", "FP32", (3, 32, 32)),)
    assert file.signature.outputs == (TensorSpec("logits", "FP32", (10,)),)
    assert file.signature.scores == Scores("logits", "logits")
    assert file.signature.platform == "onnxruntime_onnx"
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(resnet_onnx, options)
    (own,) = session.run(None, {"x": queries})
    np.testing.assert_array_equal(file.run({"x": queries})["logits"], own)
    np.testing.assert_allclose(own, wanted, rtol=1e-4, atol=1e-5)


def test_an_onnx_file_of_tokens(tmp_path: Path) -> None:
    path = factories.words_onnx(tmp_path / "words.onnx")
    model = open_model(path)
    assert model.signature.inputs == (TensorSpec("tokens", "INT32", (2048,)),)
    outputs = (TensorSpec("scores", "FP32", (6,)), TensorSpec("label", "INT64", ()))
    assert model.signature.outputs == outputs
    assert model.signature.scores == Scores("scores", "probabilities")
    queries = probe_inputs(model.signature.inputs)
    session = onnxruntime.InferenceSession(path)
    check_equal(model.run(queries), session.run(None, queries))


def test_a_factory_in_a_file_with_inputs_that_are_told(tmp_path: Path) -> None:
    (tmp_path / "layers_of_mine.py").write_text("WIDTH = 5\n")
    path = tmp_path / "mine.py"
    path.write_text(
        "from layers_of_mine import WIDTH\nfrom torch import nn\n"
        "def make():\n    return nn.Linear(16, WIDTH)\n"
    )
    model = open_model(f"{path}:make", inputs=["input:FP32:16"])
    assert model.signature.outputs == (TensorSpec("output", "FP32", (5,)),)
    again = open_model(f"{path}:make", inputs=["input:FP32:16"])
    queries = probe_inputs(model.signature.inputs)
    check_equal(again.run(queries), list(model.run(queries).values()))  # weights are not at random
    path.write_text(path.read_text() + "\n")
    with pytest.raises(UserError, match=r"the front end has \w{16}: restart the service"):
        again.source.open()


def test_a_source_travels_as_json_and_refuses_other_files(tmp_path: Path) -> None:
    path = factories.words_onnx(tmp_path / "words.onnx", ("batch", "length"))
    source = open_model(path, inputs=["tokens:INT32:7"], scores="scores:logits").source
    sent = ModelSource(**json.loads(json.dumps(asdict(source))))
    assert sent == source
    assert sent.open().signature.scores == Scores("scores", "logits")
    factories.words_onnx(path, ("batch", "words"))
    with pytest.raises(UserError, match=rf"the front end has {source.digest}: restart"):
        sent.open()


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.other = nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False)
        self.other.weight = self.one.weight

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.other(self.one(x))
        return found


def tied() -> tuple[nn.Module, Tensor]:
    return Tied(), torch.zeros(1, 4)


def test_weights_fill_a_factory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(factories, "tied", tied, raising=False)
    network = Tied()
    save_model(network, str(tmp_path / "w.safetensors"))  # holds one of the two
    model = open_model(f"{PLACE}:tied", weights=tmp_path / "w.safetensors")
    queries = probe_inputs(model.signature.inputs)
    check_equal(model.run(queries), pytorch(network, queries))
    other = open_model(f"{PLACE}:tied")
    assert other.source.digest != model.source.digest


def test_opening_a_model_changes_nothing_of_this_processs_arithmetic(tmp_path: Path) -> None:
    """ONNX Runtime's first session of a process does, for good, so another process opens it."""
    path = factories.save_onnx(factories.faint, tmp_path / "faint.onnx")
    code = (
        "import sys, torch; from codedinvnet.models import open_model; "
        "open_model(sys.argv[1]); print(float(torch.full((8,), 1e-30).mul(1e-10).sum()))"
    )
    found = subprocess.run(
        [sys.executable, "-c", code, str(path)], capture_output=True, text=True, check=True
    )
    assert float(found.stdout) > 0
