"""Models of all kinds as a user would bring them, small; and their files."""

from __future__ import annotations

import inspect
import warnings
from collections import OrderedDict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor, nn

from codedinvnet.nn.resnet import ResNet

PLACE = "tests.models.factories"
TOKENS, WORDS = 2048, 50


def resnet() -> tuple[nn.Module, Tensor]:
    return ResNet(3, 10, width=4, blocks=(1, 1)), torch.zeros(2, 3, 32, 32)


def mlp() -> tuple[nn.Module, Tensor]:
    layers = nn.Sequential(nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 3), nn.Softmax(1))
    return layers, torch.zeros(1, 16)


def plain_mlp() -> nn.Module:
    return mlp()[0]


class Words(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.head = nn.Embedding(WORDS, 4), nn.Linear(4, 6)

    def forward(self, tokens: Tensor) -> dict[str, Tensor]:
        return {"logits": self.head(self.embedding(tokens).mean(1))}


def words() -> tuple[nn.Module, dict[str, Tensor]]:
    return Words(), {"tokens": torch.zeros(1, TOKENS, dtype=torch.int32)}


class Pixels(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(48, 5)

    def forward(self, pixels: Tensor) -> Tensor:
        found: Tensor = self.head(pixels.flatten(1).float() / 255)
        return found


def pixels() -> tuple[nn.Module, Tensor]:
    return Pixels(), torch.zeros(1, 3, 4, 4, dtype=torch.uint8)


class Answer(NamedTuple):
    label: Tensor
    features: Tensor
    scores: tuple[Tensor, ...]


class Pair(nn.Module):
    """Two inputs, and outputs of several types, one of them a tuple."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(6, 4)

    def forward(self, numbers: Tensor, mask: Tensor) -> Answer:
        logits = self.head(numbers * mask)
        return Answer(logits.argmax(1), numbers[:, :2, None].double(), (logits, logits.softmax(1)))


def pair() -> tuple[nn.Module, tuple[Tensor, Tensor]]:
    return Pair(), (torch.zeros(1, 6), torch.zeros(1, 6, dtype=torch.bool))


class ModelOutput(OrderedDict[str, Any]):
    """In the place of transformers', which is one, too."""


class Applied(nn.Module):
    """Returns whatever a function makes of its input."""

    def __init__(self, function: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Any:
        return self.function(x)


def applied(function: Callable[[Tensor], Any]) -> Callable[[], tuple[nn.Module, Tensor]]:
    """Return a factory of a model of vectors of 4."""
    return lambda: (Applied(function), torch.zeros(1, 4))


def _two_heads(x: Tensor) -> dict[str, Any]:
    scores = x @ torch.linspace(-1, 1, 12).reshape(4, 3)
    return {"scores_0": scores, "label": scores.argmax(1)}


two_headed = applied(_two_heads)
faint = applied(lambda x: x * 1e-10)
model_output = applied(lambda x: ModelOutput(loss=None, logits=x * 2, hidden=(x, x + 1)))
mixes = applied(lambda x: x - x.mean(0) * (len(x) > 1))
rounds = applied(lambda x: x * (1 + 0.05 * (len(x) > 1)))
"""As matrix products do, less, which compute several queries in another order."""
no_batch_axis = applied(lambda x: x.sum(0))
one_row = applied(lambda x: x.sum(0, keepdim=True))
at_random = applied(torch.rand_like)
half = applied(lambda x: x.bfloat16())
number = applied(len)
fails = applied(lambda x: x.view(77))
single_class = applied(lambda x: x[:, :1])
nothing = applied(lambda x: {})


def raises() -> nn.Module:
    raise RuntimeError("no such data set\nand more")


def no_module() -> int:
    return 3


def odd_example() -> tuple[nn.Module, dict[str, Any]]:
    return Applied(abs), {"x": 3}


def many_examples() -> tuple[nn.Module, tuple[Tensor, Tensor]]:
    return Applied(abs), (torch.zeros(1, 4), torch.zeros(1, 4))


def complex_example() -> tuple[nn.Module, Tensor]:
    return Applied(abs), torch.zeros(1, 4, dtype=torch.complex64)


def made(factory: Callable[[], Any]) -> tuple[nn.Module, list[Tensor]]:
    """Return a factory's module, as it is when a source's factory makes it, and its inputs."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        module, examples = factory()
    if isinstance(examples, Tensor):
        examples = [examples]
    values = examples.values() if isinstance(examples, dict) else examples
    return module.eval(), list(values)


def save_onnx(factory: Callable[[], Any], path: Path, external: bool = False) -> Path:
    """Write a factory's model by `torch.onnx.export`, its inputs named as `forward` names them."""
    module, examples = made(factory)
    inputs = tuple(torch.cat([example[:1]] * 2) for example in examples)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.onnx.export(
            module,
            inputs,
            dynamo=True,
            verbose=False,
            dynamic_shapes=tuple({0: torch.export.Dim.DYNAMIC} for _ in inputs),
            input_names=[*inspect.signature(module.forward).parameters],
            output_names=["logits"],
        )
    assert program is not None
    program.save(path, external_data=external)
    return path


def linked_onnx(factory: Callable[[], Any], folder: Path, data: str) -> Path:
    """Return a model as Hugging Face's cache has it: links to files of other names, elsewhere."""
    snapshot = folder / "snapshots" / "1"
    snapshot.mkdir(parents=True)
    path = snapshot / "model.onnx"
    save_onnx(factory, path, external=True)
    (folder / "blobs").mkdir()
    (folder / "elsewhere").mkdir()
    for name, target in (("model.onnx", "blobs/aaa"), ("model.onnx.data", data)):
        (snapshot / name).rename(folder / target)
        (snapshot / name).symlink_to(Path("../..") / target)
    return path


Value = tuple[str, int, Sequence[int | str | None]]
"""Name, element type and shape of an ONNX model's input or output."""


def write_graph(
    path: Path,
    nodes: Sequence[onnx.NodeProto],
    inputs: Sequence[Value],
    outputs: Sequence[Value],
    weights: dict[str, np.ndarray] | None = None,
    opset: int = 18,
) -> Path:
    """Write an ONNX file by hand."""
    graph = helper.make_graph(
        nodes,
        "graph",
        [helper.make_tensor_value_info(*value) for value in inputs],
        [helper.make_tensor_value_info(*value) for value in outputs],
        [numpy_helper.from_array(array, name) for name, array in (weights or {}).items()],
    )
    imports = [helper.make_opsetid("", opset)]
    path.write_bytes(
        helper.make_model(graph, opset_imports=imports, ir_version=9).SerializeToString()
    )
    return path


def words_onnx(path: Path, axes: Sequence[int | str | None] = ("batch", TOKENS)) -> Path:
    """Write a classifier of int32 tokens with two outputs."""
    generator = np.random.default_rng(0)
    weights = {
        "table": generator.normal(size=(WORDS, 4)).astype(np.float32),
        "head": generator.normal(size=(4, 6)).astype(np.float32),
        "axis": np.array([1]),
    }
    nodes = [
        helper.make_node("Gather", ["table", "tokens"], ["embedded"]),
        helper.make_node("ReduceMean", ["embedded", "axis"], ["pooled"], keepdims=0),
        helper.make_node("MatMul", ["pooled", "head"], ["logits"]),
        helper.make_node("Softmax", ["logits"], ["scores"], axis=1),
        helper.make_node("ArgMax", ["logits"], ["label"], axis=1, keepdims=0),
    ]
    outputs: list[Value] = [
        ("scores", TensorProto.FLOAT, ["batch", 6]),
        ("label", TensorProto.INT64, ["batch"]),
    ]
    return write_graph(path, nodes, [("tokens", TensorProto.INT32, axes)], outputs, weights)


def identity_onnx(
    path: Path, axes: Sequence[int | str | None], kind: int = TensorProto.FLOAT, opset: int = 18
) -> Path:
    """Write a model that returns its input."""
    nodes = [helper.make_node("Identity", ["x"], ["y"])]
    return write_graph(path, nodes, [("x", kind, axes)], [("y", kind, axes)], opset=opset)


def endless_onnx(path: Path, features: int) -> Path:
    """Write a model that computes for ever."""
    number = helper.make_tensor_value_info("number", TensorProto.INT64, [])
    flags = [helper.make_tensor_value_info(n, TensorProto.BOOL, []) for n in ("go on", "still")]
    floats = [
        helper.make_tensor_value_info(n, TensorProto.FLOAT, ["n", features]) for n in ("v", "w")
    ]
    steps = [
        helper.make_node("Identity", ["go on"], ["still"]),
        helper.make_node("Identity", ["v"], ["w"]),
    ]
    body = helper.make_graph(steps, "body", [number, flags[0], floats[0]], [flags[1], floats[1]])
    nodes = [helper.make_node("Loop", ["", "true", "x"], ["logits"], body=body)]
    ends: list[Value] = [(name, TensorProto.FLOAT, ["batch", features]) for name in ("x", "logits")]
    return write_graph(path, nodes, ends[:1], ends[1:], {"true": np.array(True)})
