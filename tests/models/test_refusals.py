"""What cannot be opened: one line that says what, and where."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from onnx import TensorProto, helper

from codedinvnet.common.engines import ENGINES, ONNX_RUNTIME
from codedinvnet.common.errors import UserError
from codedinvnet.models import open_model
from tests.models import factories
from tests.models.factories import PLACE, identity_onnx

FLOAT = helper.make_tensor_type_proto(TensorProto.FLOAT, [])
"""A map from a class to its score."""


def refused(told: str, source: Any, **options: Any) -> None:
    with pytest.raises(UserError, match=told) as caught:
        open_model(source, **options)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("one_row", r"'output' has shape \(1, 4\) for two queries, and \(1, 4\) for one"),
        ("mixes", "'output' of a query depends on the other queries of its batch"),
        ("no_batch_axis", r"'output' has shape \(4,\) for one query: it has no batch axis"),
        ("half", r"'output' is torch\.bfloat16, which the protocol lacks"),
        ("number", "'output' is a int, and no tensor"),
        ("fails", "fails on a query: shape '.77.' is invalid"),
        ("nothing", "returns no tensor"),
        ("raises", "factory .*:raises raised RuntimeError: no such data set$"),
        ("no_module", r"returned a int, and neither a torch\.nn\.Module"),
        ("odd_example", "the example of 'x' is no tensor"),
        ("many_examples", "returned 2 example inputs, and .* takes 1 by name"),
        ("complex_example", r"'x' is torch\.complex64, which the protocol lacks"),
        ("plain_mlp", "no example inputs: .* inputs as NAME:DATATYPE:SHAPE of input"),
        ("mobilnet", "has no function 'mobilnet', did you mean 'mobilenet'"),
    ],
)
def test_a_factory(name: str, told: str) -> None:
    refused(told, f"{PLACE}:{name}")


def test_a_factory_that_is_random_is_no_affair_of_this() -> None:
    assert open_model(f"{PLACE}:at_random").signature.max_batch is None


def test_a_factory_that_is_nowhere(tmp_path: Path) -> None:
    refused("nowhere:f cannot be imported: ModuleNotFoundError", "nowhere:f")
    refused("cannot be imported: FileNotFoundError: there is no file", f"{tmp_path}/a.py:f")
    (tmp_path / "a.py").write_text("1 / 0")
    refused("cannot be imported: ZeroDivisionError: division by zero", f"{tmp_path}/a.py:f")
    (tmp_path / "b.py").write_text("def f():\n    raise SystemExit(3)")
    refused("b.py:f raised SystemExit: 3", f"{tmp_path}/b.py:f")
    (tmp_path / "c.py").write_text("raise SystemExit(3)")
    refused("cannot be imported: SystemExit: 3", f"{tmp_path}/c.py:f")


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("input:FP32:16x", "'16x' is no shape of one query"),
        ("input:FP32:0", "'0' is no shape"),
        ("input:FLOAT:16", "is not NAME:DATATYPE:SHAPE, such as images:FP32:3x32x32"),
        ("input", "is not NAME:DATATYPE:SHAPE"),
        ("x:FP32:16", "has no input 'x': its inputs are input$"),
        ("input:BYTES:16", "'input' is BYTES, which PyTorch does not have"),
        ("input:FP32:15", "fails on a query: mat1 and mat2 shapes cannot be multiplied"),
    ],
)
def test_inputs_that_are_told(text: str, told: str) -> None:
    refused(told, f"{PLACE}:plain_mlp", inputs=[text])


@pytest.mark.parametrize(
    ("name", "scores", "told"),
    [
        ("pair", "score", r"no output 'score', did you mean 'scores_1'\? \(its outputs: label, "),
        ("pair", "label", r"'label' of .* is INT64 \(B\), and scores are floats \(B, classes\)"),
        ("pair", "features:logits", r"is FP64 \(B, 2, 1\), and scores are floats"),
        ("pair", "scores_0:probabilities", "holds no probabilities: its rows do not sum to 1"),
        ("single_class", "output", r"is FP32 \(B, 1\), and scores are floats"),
    ],
)
def test_scores_that_are_none(name: str, scores: str, told: str) -> None:
    refused(told, f"{PLACE}:{name}", scores=scores)
    assert open_model(f"{PLACE}:{name}").signature.scores is None


def test_scores_that_are_told() -> None:
    for told, kind in (
        ("scores_0", "logits"),
        ("scores_1", "probabilities"),
        ("scores_1:logits", "logits"),
    ):
        scores = open_model(f"{PLACE}:pair", scores=told).signature.scores
        assert scores is not None
        assert (scores.output, scores.kind) == (told.partition(":")[0], kind)


def test_sources_and_engines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    refused("no model 'mnits': neither a folder with bundle.json nor a shipped", "mnits")
    refused("may be a pickle, which is not read", "weights.pth")
    refused("has weights and no model: give a factory, with weights", "a.safetensors")
    refused("there is no file .*a.onnx", tmp_path / "a.onnx")
    refused("there is no file w$", f"{PLACE}:mlp", weights="w")
    refused("'tensorrt' is not one of pytorch, onnxruntime", f"{PLACE}:mlp", engine="tensorrt")
    file = identity_onnx(tmp_path / "b.onnx", ["batch", 3])
    refused("runs on ONNX Runtime, not on pytorch", file, engine="pytorch")
    refused("computes on processors only, not on cuda", file, device="cuda")
    refused("computes on processors only, not on abacus", file, device="abacus")
    refused("has its own; only a factory takes others", file, weights="w")
    lacking = replace(ENGINES[ONNX_RUNTIME], needed=("nowhere_to_be_found",))
    monkeypatch.setitem(ENGINES, ONNX_RUNTIME, lacking)
    refused(r"needs nowhere_to_be_found: pip install 'codedinvnet\[onnx\]'", file)
    refused("there is no file .*a.onnx", tmp_path / "a.onnx")  # said first: it is the nearer mend
    refused("runs on PyTorch, not on onnxruntime: export it", f"{PLACE}:mlp", engine="onnxruntime")


def test_damaged_weights(tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"
    path.write_bytes(b"\x80\x02cut")
    refused("w.safetensors is truncated or not a safetensors", f"{PLACE}:mlp", weights=path)


@pytest.mark.parametrize(
    ("axes", "told"),
    [
        (["n", 3, "m"], r"'x' has several axes .* which may be the batch: \(n, 3, m\); give"),
        ([3, "n"], r"'x' is \(3, n\): the free axis must come first, and be the batch"),
        ([8, 3], r"its first axis must be a free batch, or a batch of 1, not 8"),
        ([], "'x' is a single value: it has no batch axis"),
    ],
)
def test_the_axes_of_an_onnx_file(axes: list[int | str | None], told: str, tmp_path: Path) -> None:
    refused(told, identity_onnx(tmp_path / "a.onnx", axes))


def test_an_onnx_file_whose_inputs_disagree(tmp_path: Path) -> None:
    inputs: list[factories.Value] = [
        ("a", TensorProto.FLOAT, ["n", 4]),
        ("b", TensorProto.FLOAT, [1, 4]),
    ]
    nodes = [helper.make_node("Add", ["a", "b"], ["sum"])]
    outputs: list[factories.Value] = [("sum", TensorProto.FLOAT, ["n", 4])]
    path = factories.write_graph(tmp_path / "a.onnx", nodes, inputs, outputs)
    refused("input 'b' has no free batch axis, though others have", path)
    nodes = [helper.make_node("RandomNormal", [], ["sum"], shape=[1, 4])]
    refused("has no input", factories.write_graph(tmp_path / "b.onnx", nodes, [], outputs))


def test_onnx_files_that_cannot_be_run(tmp_path: Path, resnet_onnx: Path) -> None:
    cut = tmp_path / "cut.onnx"
    cut.write_bytes(resnet_onnx.read_bytes()[:3000])
    refused("cut.onnx is truncated or no ONNX file", cut)
    cut.write_bytes(b"")
    refused("cut.onnx: ONNX Runtime .* cannot run it", cut)
    path = identity_onnx(tmp_path / "a.onnx", ["n", 3], opset=99)
    refused(r"cannot run it: [^:/(]*[Oo]pset 99", path)
    nodes = [helper.make_node("Mine", ["x"], ["y"], domain="mine")]
    value: list[factories.Value] = [("x", TensorProto.FLOAT, ["n", 3])]
    unknown = factories.write_graph(
        tmp_path / "b.onnx", nodes, value, [("y", TensorProto.FLOAT, ["n", 3])]
    )
    refused(r"cannot run it: .*mine", unknown)


def test_types_that_the_protocol_lacks(tmp_path: Path) -> None:
    path = identity_onnx(tmp_path / "a.onnx", ["n", 3], TensorProto.BFLOAT16)
    refused(r"output 'y' is tensor\(bfloat16\), which the protocol lacks", path)
    nodes = [helper.make_node("Cast", ["x"], ["y"], to=TensorProto.FLOAT)]
    path = factories.write_graph(
        tmp_path / "b.onnx",
        nodes,
        [("x", TensorProto.BFLOAT16, ["n", 3])],
        [("y", TensorProto.FLOAT, ["n", 3])],
    )
    refused(r"input 'x' is tensor\(bfloat16\), which the protocol lacks", path)
