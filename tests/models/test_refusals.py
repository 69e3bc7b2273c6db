"""What cannot be opened: one line that says what, and where."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from onnx import TensorProto, helper
from safetensors.torch import save_file

from codedinvnet.common.errors import UserError
from codedinvnet.models import onnx_file, open_model
from tests.models import factories
from tests.models.factories import PLACE, identity_onnx


def refused(told: str, source: Any, **options: Any) -> None:
    with pytest.raises(UserError, match=told) as caught:
        open_model(source, **options)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "options", "told"),
    [
        ("one_row", {}, r"\(1, 4\) for 4 queries"),
        ("mixes", {}, "depends on the other queries of its batch"),
        ("no_batch_axis", {}, "has no batch axis"),
        ("half", {}, r"fails on a query: .*BFloat16"),
        ("number", {}, "a int, and no tensor"),
        ("fails", {}, "fails on a query"),
        ("nothing", {}, "returns no tensor"),
        ("raises", {}, "raised RuntimeError: no such data set$"),
        ("no_module", {}, r"neither a torch\.nn\.Module"),
        ("odd_example", {}, "the example of 'x' is no tensor"),
        ("many_examples", {}, "takes 1 by name"),
        ("complex_example", {}, r"torch\.complex64, which the protocol lacks"),
        ("plain_mlp", {}, "no example inputs"),
        ("resnett", {}, "AttributeError: .* no attribute 'resnett'"),
        ("plain_mlp", {"inputs": ["input:FP32:16x"]}, "no shape of one query"),
        ("plain_mlp", {"inputs": ["input:FP32:0"]}, "no shape of one query"),
        ("plain_mlp", {"inputs": ["input:FLOAT:16"]}, "is not NAME:DATATYPE:SHAPE"),
        ("plain_mlp", {"inputs": ["x:FP32:16"]}, "its inputs are input$"),
        ("plain_mlp", {"inputs": ["input:BYTES:16"]}, "fails on a query: can't convert"),
        ("plain_mlp", {"inputs": ["input:FP32:15"]}, "fails on a query"),
        ("pair", {"scores": "score"}, r"no output .* scores_1 is FP32 \(B, 4\)$"),
        ("pair", {"scores": "features:logits"}, r"features is FP64 \(B, 2, 1\)"),
        ("pair", {"scores": "scores_0:probabilities"}, "holds no probabilities"),
        ("single_class", {"scores": "output"}, "floats .* of two classes or more"),
        ("mlp", {"weights": "w"}, "cannot read w: No such file"),
    ],
)
def test_a_factory(name: str, options: dict[str, Any], told: str) -> None:
    refused(told, f"{PLACE}:{name}", **options)


@pytest.mark.parametrize("name", ["at_random", "rounds"])
def test_answers_may_differ_if_not_by_the_other_queries(name: str) -> None:
    assert open_model(f"{PLACE}:{name}").signature.max_batch is None


@pytest.mark.parametrize(
    ("text", "told"),
    [
        (None, "FileNotFoundError"),
        ("1 / 0", "ZeroDivisionError: division by zero"),
        ("def f():\n    raise SystemExit(3)", "raised SystemExit: 3"),
        ("raise SystemExit(3)", "raised SystemExit: 3"),
    ],
)
def test_a_factory_in_a_file(text: str | None, told: str, tmp_path: Path) -> None:
    if text is not None:
        (tmp_path / "a.py").write_text(text)
    refused(told, f"{tmp_path}/a.py:f")


@pytest.mark.parametrize(
    ("told", "kind"),
    [("scores_0", "logits"), ("scores_1", "probabilities"), ("scores_1:logits", "logits")],
)
def test_scores_that_are_told(told: str, kind: str) -> None:
    scores = open_model(f"{PLACE}:pair", scores=told).signature.scores
    assert scores is not None
    assert (scores.output, scores.kind) == (told.partition(":")[0], kind)


def test_sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    refused("neither a folder with bundle.json nor a shipped", "mnits")
    refused("mnist is a bundle, which `serve` takes as it is", "mnist")
    refused("m is on a server", "http://localhost:8000/v2/models/m")
    refused("may be a pickle", "weights.pth")
    refused("weights and no model", "a.safetensors")
    refused("cannot read .*a.onnx: No such file", tmp_path / "a.onnx")
    (tmp_path / "w.safetensors").write_bytes(b"\x80\x02cut")
    refused("not a safetensors file", f"{PLACE}:mlp", weights=tmp_path / "w.safetensors")
    file = identity_onnx(tmp_path / "b.onnx", ["batch", 3])
    refused("computed on processors only, not on cuda", file, device="cuda")
    refused("only a factory takes others", file, weights="w")
    save_file({"0.weight": torch.zeros(9, 16)}, tmp_path / "w.safetensors")
    refused("another architecture: .*0.weight", f"{PLACE}:mlp", weights=tmp_path / "w.safetensors")
    monkeypatch.setattr(onnx_file, "NEEDED", ("nowhere_to_be_found",))
    refused(r"need nowhere_to_be_found: pip install 'codedinvnet\[onnx\]'", file)


Axes = Sequence["int | str | None"]


@pytest.mark.parametrize(
    ("inputs", "told"),
    [
        ([["n", 3, "m"]], "several axes .* which may be the batch"),
        ([[3, "n"]], "the free axis must come first"),
        ([[8, 3]], "a batch of 1, not 8"),
        ([[]], "has no batch axis"),
        ([["n", 4], [1, 4]], "input 'x1' has no free batch axis, though others have"),
        ([], "has no input"),
    ],
)
def test_the_axes_of_an_onnx_file(inputs: list[Axes], told: str, tmp_path: Path) -> None:
    names = [f"x{number}" for number in range(len(inputs))]
    node = helper.make_node("Sum", names, ["y"])
    if not names:
        node = helper.make_node("RandomNormal", [], ["y"], shape=[1, 4])
    values = [(name, TensorProto.FLOAT, axes) for name, axes in zip(names, inputs, strict=True)]
    output: factories.Value = ("y", TensorProto.FLOAT, inputs[0] if inputs else ["n", 4])
    refused(told, factories.write_graph(tmp_path / "a.onnx", [node], values, [output]))


def test_onnx_files_that_cannot_be_run(tmp_path: Path, resnet_onnx: Path) -> None:
    cut = tmp_path / "cut.onnx"
    cut.write_bytes(resnet_onnx.read_bytes()[:3000])
    refused("cut.onnx is truncated or no ONNX file", cut)
    path = identity_onnx(tmp_path / "a.onnx", ["n", 3], opset=99)
    refused(r"cannot run it: [^:/(]*[Oo]pset 99", path)


@pytest.mark.parametrize("operator", ["Identity", "Cast"])
def test_types_that_the_protocol_lacks(operator: str, tmp_path: Path) -> None:
    node = helper.make_node(operator, ["x"], ["y"])
    kinds, told = [TensorProto.BFLOAT16] * 2, "output 'y'"
    if operator == "Cast":
        node.attribute.append(helper.make_attribute("to", TensorProto.FLOAT))
        kinds, told = [TensorProto.BFLOAT16, TensorProto.FLOAT], "input 'x'"
    values: list[factories.Value] = [(n, k, ["n", 3]) for n, k in zip("xy", kinds, strict=True)]
    path = factories.write_graph(tmp_path / "a.onnx", [node], values[:1], values[1:])
    refused(rf"{told}.*tensor\(bfloat16\), which the protocol lacks", path)
