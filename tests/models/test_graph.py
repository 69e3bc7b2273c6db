"""Every operator of a graph gives what ONNX Runtime gives, and what is not known is refused."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")

from onnx import TensorProto, helper, numpy_helper  # noqa: E402

from codedinvnet.models.graph import OPERATORS, Graph, Unsupported, read_graph  # noqa: E402
from codedinvnet.models.onnx_file import export  # noqa: E402

SHAPE = (2, 4, 7, 9)
RANDOM = np.random.default_rng(0)
CHANNELS = [np.abs(RANDOM.normal(size=4)).astype(np.float32) + 0.5 for _ in range(4)]


def weights(*shape: int) -> np.ndarray:
    found: np.ndarray = RANDOM.normal(size=shape).astype(np.float32)
    return found


def integers(*values: int) -> np.ndarray:
    return np.array(values, np.int64)


def number(value: float) -> np.ndarray:
    return np.array(value, np.float32)


CASES: Sequence[tuple[str, Sequence[np.ndarray], dict[str, Any]]] = [
    ("Abs", [], {}),
    ("Add", [weights(4, 1, 1)], {}),
    ("Add", [number(2.0)], {}),
    ("AveragePool", [], {"kernel_shape": [3, 2], "strides": [2, 2]}),
    ("AveragePool", [], {"kernel_shape": [3, 3], "pads": [1, 1, 1, 1]}),
    ("AveragePool", [], {"kernel_shape": [3, 3], "pads": [1, 1, 1, 1], "count_include_pad": 1}),
    ("AveragePool", [], {"kernel_shape": [2, 2], "strides": [2, 2], "ceil_mode": 1}),
    ("BatchNormalization", CHANNELS, {"epsilon": 1e-3}),
    ("Cast", [], {"to": TensorProto.FLOAT}),
    ("Clip", [number(-0.5), number(0.7)], {}),
    ("Clip", [number(0.0)], {}),
    ("Concat", [weights(2, 3, 7, 9)], {"axis": 1}),
    ("Conv", [weights(6, 4, 3, 3), weights(6)], {"strides": [2, 1], "pads": [1, 1, 1, 1]}),
    ("Conv", [weights(6, 4, 3, 3)], {"strides": [2, 2], "pads": [0, 0, 1, 1]}),
    ("Conv", [weights(6, 4, 3, 3)], {"strides": [2, 2], "auto_pad": "SAME_UPPER"}),
    ("Conv", [weights(6, 4, 4, 3)], {"strides": [2, 2], "auto_pad": "SAME_LOWER"}),
    ("Conv", [weights(4, 1, 3, 3)], {"group": 4, "dilations": [2, 2]}),
    ("Div", [weights(1, 4, 1, 1)], {}),
    ("Elu", [], {"alpha": 0.5}),
    ("Erf", [], {}),
    ("Exp", [], {}),
    ("Flatten", [], {}),
    ("Gelu", [], {"approximate": "tanh"}),
    ("Gather", [integers(2, 0)], {"axis": 1}),
    ("Gather", [np.array(1)], {"axis": -1}),
    ("GlobalAveragePool", [], {}),
    ("GlobalMaxPool", [], {}),
    ("HardSigmoid", [], {"alpha": 0.3}),
    ("HardSwish", [], {}),
    ("Identity", [], {}),
    ("LayerNormalization", [weights(9), weights(9)], {"axis": -1}),
    ("LogSoftmax", [], {"axis": 1}),
    ("LeakyRelu", [], {"alpha": 0.2}),
    ("Log", [], {}),
    ("MatMul", [weights(9, 5)], {}),
    ("Max", [number(0.3), weights(4, 1, 1)], {}),
    ("MaxPool", [], {"kernel_shape": [3, 3], "strides": [2, 2], "pads": [1, 1, 1, 1]}),
    ("MaxPool", [], {"kernel_shape": [2, 2], "strides": [2, 2], "auto_pad": "SAME_UPPER"}),
    ("Min", [number(0.3), weights(4, 1, 1)], {}),
    ("Mul", [weights(4, 1, 1)], {}),
    ("Neg", [], {}),
    ("PRelu", [weights(4, 1, 1)], {}),
    ("Pow", [number(2.0)], {}),
    ("Pow", [weights(4, 1, 1)], {}),
    ("Pad", [integers(0, 0, 1, 2, 0, 0, 0, 3), number(0.5)], {}),
    ("Reciprocal", [], {}),
    ("ReduceMax", [integers(1)], {}),
    ("ReduceMean", [integers(2, 3)], {"keepdims": 0}),
    ("ReduceMean", [integers(-1)], {}),
    ("ReduceSum", [integers(1, 3)], {"keepdims": 0}),
    ("Relu", [], {}),
    ("Reshape", [integers(0, -1, 9)], {}),
    ("Reshape", [integers(-1, 252)], {"allowzero": 1}),
    ("Selu", [], {}),
    ("Sigmoid", [], {}),
    ("Slice", [integers(1, -7), integers(9, -2), integers(1, 3), integers(1, 2)], {}),
    ("Slice", [integers(0, 1), integers(2**40, 3), integers(0, 1)], {}),
    ("Softmax", [], {"axis": 1}),
    ("Softplus", [], {}),
    ("Sub", [weights(1, 4, 1, 1)], {}),
    ("Sum", [weights(4, 1, 1), number(1.5)], {}),
    ("Tanh", [], {}),
    ("Transpose", [], {"perm": [0, 2, 3, 1]}),
    ("Unsqueeze", [integers(1, 3)], {}),
]


def model(
    nodes: Sequence[Any], constants: Sequence[np.ndarray], output: str, shape: Sequence[int] = SHAPE
) -> Any:
    """Return a model with the input x and the constants c0, c1 and so on."""
    given = helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)
    found = helper.make_tensor_value_info(output, TensorProto.FLOAT, None)
    held = [numpy_helper.from_array(array, f"c{i}") for i, array in enumerate(constants)]
    graph = helper.make_graph(list(nodes), "graph", [given], [found], held)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9)


def both(content: Any, output: str, *, logits: bool = False) -> tuple[np.ndarray, Graph, Any]:
    """Return ONNX Runtime's answer, the graph, and the graph's answer."""
    x = RANDOM.normal(size=SHAPE).astype(np.float32)
    session = onnxruntime.InferenceSession(content.SerializeToString())
    (wanted,) = session.run(None, {"x": x})
    graph = read_graph(content, output, logits=logits).eval()
    with torch.no_grad():
        return wanted, graph, graph(torch.from_numpy(x)).numpy()


@pytest.mark.parametrize(("operator", "constants", "told"), CASES)
def test_an_operator_gives_what_onnx_runtime_gives(
    operator: str, constants: Sequence[np.ndarray], told: dict[str, Any]
) -> None:
    names = ["x", *(f"c{i}" for i in range(len(constants)))]
    node = helper.make_node(operator, names, ["y"], **told)
    wanted, graph, found = both(model([node], constants, "y"), "y")
    np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-5)
    again = Graph(graph.described).eval()
    for key, value in graph.state_dict().items():
        torch.testing.assert_close(again.state_dict()[key], value, rtol=0, atol=0)


def test_those_without_a_case_of_their_own() -> None:
    nodes = [
        helper.make_node("Equal", ["x", "x"], ["same"]),
        helper.make_node("Cast", ["same"], ["exact"], to=TensorProto.DOUBLE),
        helper.make_node("Cast", ["exact"], ["one"], to=TensorProto.FLOAT),
        helper.make_node("Add", ["x", "one"], ["more"]),
        helper.make_node("Mul", ["c3", "more"], ["half"]),
        helper.make_node("Mul", ["x", "half"], ["square"]),
        helper.make_node("Sqrt", ["square"], ["size"]),
        helper.make_node("ReduceMean", ["size", "c0"], ["mean"], keepdims=1),
        helper.make_node("Squeeze", ["mean", "c0"], ["flat"]),
        helper.make_node("Gemm", ["flat", "c1", "c2"], ["y"], transB=1),
    ]
    constants = [integers(2, 3), weights(5, 4), weights(5), number(0.5)]
    wanted, graph, found = both(model(nodes, constants, "y"), "y")
    np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-5)
    assert {name: tuple(p.shape) for name, p in graph.named_parameters()} == {
        graph.names["c1"]: (5, 4),
        graph.names["c2"]: (5,),
    }
    x = RANDOM.normal(size=SHAPE).astype(np.float32)
    content = export(graph, {"x": torch.from_numpy(x)}, ["y"])
    (again,) = onnxruntime.InferenceSession(content).run(None, {"x": x})
    with torch.no_grad():
        np.testing.assert_allclose(again, graph(torch.from_numpy(x)), rtol=1e-4, atol=1e-5)
    tried = {operator for operator, _, _ in CASES} | {node.op_type for node in nodes}
    assert tried | {"Split"} == set(OPERATORS)


def test_only_weights_are_trained_and_each_has_a_gradient() -> None:
    nodes = [
        helper.make_node("Sub", ["x", "c0"], ["centred"]),
        helper.make_node("Conv", ["centred", "c1", "c2"], ["maps"]),
        helper.make_node("GlobalAveragePool", ["maps"], ["mean"]),
        helper.make_node("Gather", ["c3", "c4"], ["embedding"]),
        helper.make_node("Add", ["mean", "embedding"], ["y"]),
    ]
    constants = [weights(1, 4, 1, 1), weights(3, 4, 3, 3), weights(3), weights(9, 1), integers(2)]
    graph = read_graph(model(nodes, constants, "y"), "y", logits=False)
    graph(torch.rand(SHAPE)).square().sum().backward()
    trained = dict(graph.named_parameters())
    assert set(trained) == {graph.names[name] for name in ("c1", "c2", "c3")}
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in trained.values())


@pytest.mark.parametrize("whole", [True, False])
def test_probabilities_become_logits(whole: bool) -> None:
    parts = [
        helper.make_node("Exp", ["flat"], ["e"]),
        helper.make_node("ReduceSum", ["e", "c0"], ["sum"]),
        helper.make_node("Div", ["e", "sum"], ["y"]),
    ]
    nodes = [
        helper.make_node("Flatten", ["x"], ["flat"]),
        *([helper.make_node("Softmax", ["flat"], ["y"])] if whole else parts),
    ]
    wanted, _, found = both(model(nodes, [integers(1)], "y"), "y", logits=True)
    np.testing.assert_allclose(torch.from_numpy(found).softmax(1), wanted, rtol=1e-4, atol=1e-6)


def reshaped(allowzero: int) -> tuple[list[Any], list[np.ndarray]]:
    nodes = [
        helper.make_node("Relu", ["x"], ["r"]),
        helper.make_node("Reshape", ["r", "c0"], ["flat"], allowzero=allowzero),
        helper.make_node("MatMul", ["flat", "c1"], ["y"]),
    ]
    return nodes, [integers(1, 252), weights(252, 3)]


def split_and_joined() -> tuple[list[Any], list[np.ndarray]]:
    """Return what has a class token, say, and parts of uneven and even sizes."""
    nodes = [
        helper.make_node("Split", ["x", "c0"], ["rest", "most"], axis=1),
        helper.make_node("Split", ["most"], ["four", "three"], axis=2, num_outputs=2),
        helper.make_node("Concat", ["c1", "four"], ["y"], axis=1),
    ]
    return nodes, [integers(1, 3), weights(1, 1, 4, 9)]


@pytest.mark.parametrize("made", [reshaped(0), reshaped(1), split_and_joined()])
def test_a_model_exported_for_one_query_takes_many(
    made: tuple[list[Any], list[np.ndarray]],
) -> None:
    content = model(*made, "y", (1, *SHAPE[1:]))
    session = onnxruntime.InferenceSession(content.SerializeToString())
    x = RANDOM.normal(size=SHAPE).astype(np.float32)
    wanted = [session.run(None, {"x": query[None]})[0][0] for query in x]
    with torch.no_grad():
        found = read_graph(content, "y", logits=False)(torch.from_numpy(x)).numpy()
    np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("operator", "told", "why"),
    [
        ("Celu", {}, "Celu"),
        ("Cast", {"to": TensorProto.INT64}, "cast"),
        ("Flatten", {"axis": 2}, "mixes queries"),
        ("AveragePool", {"kernel_shape": [2, 2], "pads": [0, 0, 1, 1]}, "uneven border"),
        ("MaxPool", {"kernel_shape": [2, 2], "dilations": [2, 2]}, "gaps"),
    ],
)
def test_what_is_not_known_is_refused(operator: str, told: dict[str, Any], why: str) -> None:
    node = helper.make_node(operator, ["x"], ["y"], **told)
    with pytest.raises(Unsupported, match=why):
        read_graph(model([node], [], "y"), "y", logits=False)(torch.rand(SHAPE))
