"""An ONNX classifier as a module of PyTorch, through which gradients flow and which can be trained.

It knows the operators that classifiers of images are made of (`OPERATORS`), and refuses others.
ONNX Runtime has no gradients, and converters are not kept up with what PyTorch exports today.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import reduce
from operator import add, mul, sub, truediv
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from codedinvnet.nn.convolution import conv2d

Value: TypeAlias = Any
"""A tensor, or a plain value: integers in a list, one number, or None for what is not given."""
Attributes: TypeAlias = Mapping[str, Any]
Operator: TypeAlias = Callable[[Sequence[Value], Attributes], Value]

TRAINED = {
    "Conv": (1, 2),
    "Gather": (0,),
    "Gemm": (1, 2),
    "MatMul": (1,),
    "BatchNormalization": (1, 2),
    "LayerNormalization": (1, 2),
    "PRelu": (1,),
}
"""Operator -> the inputs that are weights, if they are constants."""
FAR = 10**9
"""A slice that ends beyond keeps all."""
FLOATS = (1, 10, 11, 16)
"""ONNX's numbers of floats; all are computed as those of 32 bits."""
TINY = 1e-30
"""Smaller probabilities have no logarithm."""


class Unsupported(Exception):
    """A graph that cannot be made a module; the message says why."""


def _sides(pads: Sequence[int]) -> list[int]:
    """Return ONNX's padding, begins before ends, as PyTorch has it: both ends of the last axis."""
    half = len(pads) // 2
    pairs = zip(reversed(pads[:half]), reversed(pads[half:]), strict=True)
    return [side for pair in pairs for side in pair]


def _padded(x: Tensor, pads: Sequence[int], value: float = 0.0) -> tuple[Tensor, tuple[int, ...]]:
    """Return an image, and what a layer must pad: both sides alike; else it is padded here."""
    half = len(pads) // 2
    first, last = pads[:half], pads[half:]
    if list(first) == list(last):
        return x, tuple(first)
    return F.pad(x, _sides(pads), value=value), (0,) * half


def _layer_pads(x: Tensor, kernel: Sequence[int], told: Attributes) -> Sequence[int]:
    """Return a layer's padding, begins before ends; that of `auto_pad` is found by the size."""
    way = told.get("auto_pad", "NOTSET")
    if way in ("NOTSET", "VALID"):
        pads: Sequence[int] = told.get("pads") or [0] * (2 * len(kernel))
        return pads
    strides = told.get("strides") or [1] * len(kernel)
    dilations = told.get("dilations") or [1] * len(kernel)
    begins, ends = [], []
    for size, width, step, spread in zip(x.shape[2:], kernel, strides, dilations, strict=True):
        wanted = max(0, (-(-size // step) - 1) * step + spread * (width - 1) + 1 - size)
        less, more = wanted // 2, wanted - wanted // 2
        begins.append(more if way == "SAME_LOWER" else less)
        ends.append(less if way == "SAME_LOWER" else more)
    return [*begins, *ends]


def _conv(given: Sequence[Value], told: Attributes) -> Value:
    x, weight, bias = (*given, None)[:3]
    if weight.ndim != 4:
        raise Unsupported("a convolution that is not of images")
    x, padding = _padded(x, _layer_pads(x, weight.shape[2:], told))
    strides, dilations = (tuple(told.get(n) or (1, 1)) for n in ("strides", "dilations"))
    return conv2d(x, weight, bias, strides, padding, dilations, told.get("group", 1))


def _pool(given: Sequence[Value], told: Attributes, largest: bool) -> Value:
    x, kernel = given[0], tuple(told["kernel_shape"])
    if told.get("dilations", [1, 1]) != [1, 1] or len(kernel) != 2:
        raise Unsupported("a pool with gaps, or not of images")
    steps, whole = tuple(told.get("strides") or (1, 1)), bool(told.get("ceil_mode", 0))
    pads = _layer_pads(x, kernel, told)
    if largest:
        x, padding = _padded(x, pads, float("-inf"))
        return F.max_pool2d(x, kernel, steps, padding, ceil_mode=whole)
    inside = not told.get("count_include_pad", 0)
    if list(pads[:2]) != list(pads[2:]) and inside:
        raise Unsupported("an average over an uneven border")
    x, padding = _padded(x, pads)
    return F.avg_pool2d(x, kernel, steps, padding, whole, count_include_pad=not inside)


def _normalised(given: Sequence[Value], told: Attributes, training: bool = False) -> Value:
    x, scale, bias, mean, variance = given
    return F.batch_norm(x, mean, variance, scale, bias, training, eps=told.get("epsilon", 1e-5))


def _sliced(given: Sequence[Value], told: Attributes) -> Value:
    if "starts" in told:  # below opset 10
        given = given[0], told["starts"], told["ends"], told.get("axes")
    x, starts, ends, axes, steps = (*given, None, None)[:5]
    for place, (begin, end) in enumerate(zip(starts, ends, strict=True)):
        axis, step = axes[place] if axes else place, steps[place] if steps else 1
        size = x.shape[axis]
        if step < 1 or (axis == 0 and not (begin == 0 and step == 1 and end >= FAR)):
            raise Unsupported("a slice backwards, or of queries")
        begin, end = (max(0, v + size) if v < 0 else min(v, size) for v in (begin, end))
        x = x[(slice(None),) * axis + (slice(begin, end, step),)]
    return x


def _layer_normalised(given: Sequence[Value], told: Attributes) -> Value:
    x, scale, bias = (*given, None)[:3]
    axes = list(x.shape)[told.get("axis", -1) % x.ndim :]
    return F.layer_norm(x, axes, scale, bias, told.get("epsilon", 1e-5))


def _clip(given: Sequence[Value], told: Attributes) -> Value:
    x, low, high = (*given, None, None)[:3]
    return torch.clamp(x, told.get("min", low), told.get("max", high))


def _axes(given: Sequence[Value], told: Attributes) -> list[int]:
    axes: list[int] = told["axes"] if "axes" in told else given[1]
    return axes


def _places(x: Tensor) -> tuple[int, ...]:
    return tuple(range(2, x.ndim))


def _reduced(function: Callable[..., Tensor], given: Sequence[Value], told: Attributes) -> Value:
    return function(given[0], _axes(given, told), bool(told.get("keepdims", 1)))


def _gathered(given: Sequence[Value], told: Attributes) -> Value:
    x, places = given[0], torch.as_tensor(given[1]).long()
    return x[(slice(None),) * (told.get("axis", 0) % x.ndim) + (places,)]


def _gemm(given: Sequence[Value], told: Attributes) -> Value:
    a, b, c = (*given, None)[:3]
    a = a.t() if told.get("transA", 0) else a
    b = b if told.get("transB", 0) else b.t()
    if told.get("alpha", 1.0) != 1.0 or told.get("beta", 1.0) != 1.0:
        raise Unsupported("a scaled product")
    return F.linear(a, b, c)


def _reshape(given: Sequence[Value], told: Attributes) -> Value:
    x, sizes = given
    if not told.get("allowzero", 0):
        sizes = [x.shape[i] if size == 0 else size for i, size in enumerate(sizes)]
    return x.reshape(sizes)


def _flatten(given: Sequence[Value], told: Attributes) -> Value:
    if told.get("axis", 1) != 1:
        raise Unsupported("a flattening that mixes queries")
    return given[0].flatten(1)


def _squeeze(given: Sequence[Value], told: Attributes) -> Value:
    return given[0].squeeze(tuple(_axes(given, told)))


def _unsqueeze(given: Sequence[Value], told: Attributes) -> Value:
    x = given[0]
    for axis in sorted(_axes(given, told)):
        x = x.unsqueeze(axis)
    return x


def _pad(given: Sequence[Value], told: Attributes) -> Value:
    x, pads = given[0], told["pads"] if "pads" in told else given[1]
    if told.get("mode", "constant") != "constant" or (len(given) > 3 and given[3] is not None):
        raise Unsupported("a border that is not constant")
    value = told.get("value", given[2] if len(given) > 2 and given[2] is not None else 0.0)
    return F.pad(x, _sides(pads), value=value)


def _joined(given: Sequence[Value], told: Attributes) -> Value:
    """Join tensors; a constant that was folded for one query stands for all."""
    queries = next((len(x) for x in given if len(x) != 1), 1)
    if told["axis"] and queries != 1:
        given = [x.expand(queries, *x.shape[1:]) if len(x) == 1 else x for x in given]
    return torch.cat(list(given), told["axis"])


def _part(given: Sequence[Value], told: Attributes) -> Value:
    """Return one of the parts that a split gives."""
    (x, sizes), axis = (*given, None)[:2], told.get("axis", 0)
    if axis % x.ndim == 0:
        raise Unsupported("a split of queries")
    sizes = sizes or told.get("split") or -(-x.shape[axis] // told["parts"])
    return x.split(sizes, axis)[told["part"]]


def _as_floats(given: Sequence[Value], told: Attributes) -> Value:
    if told["to"] not in FLOATS:
        raise Unsupported("a cast to what is no float")
    return given[0].float()


def _of(function: Callable[..., Tensor]) -> Operator:
    return lambda given, told: function(*given)


OPERATORS: Mapping[str, Operator] = {
    "Abs": _of(torch.abs),
    "Add": _of(add),
    "AveragePool": lambda given, told: _pool(given, told, False),
    "BatchNormalization": _normalised,
    "Cast": _as_floats,
    "Clip": _clip,
    "Concat": _joined,
    "Conv": _conv,
    "Div": _of(truediv),
    "Elu": lambda given, told: F.elu(given[0], told.get("alpha", 1.0)),
    "Equal": lambda given, told: torch.eq(given[0], torch.as_tensor(given[1])),
    "Erf": _of(torch.erf),
    "Exp": _of(torch.exp),
    "Flatten": _flatten,
    "Gelu": lambda given, told: F.gelu(given[0], approximate=told.get("approximate", "none")),
    "Gemm": _gemm,
    "Gather": _gathered,
    "GlobalAveragePool": lambda given, told: given[0].mean(_places(given[0]), True),
    "GlobalMaxPool": lambda given, told: given[0].amax(_places(given[0]), True),
    "HardSigmoid": lambda given, told: (
        told.get("alpha", 0.2) * given[0] + told.get("beta", 0.5)
    ).clamp(0, 1),
    "HardSwish": _of(F.hardswish),
    "Identity": lambda given, told: given[0],
    "LayerNormalization": _layer_normalised,
    "LeakyRelu": lambda given, told: F.leaky_relu(given[0], told.get("alpha", 0.01)),
    "Log": _of(torch.log),
    "LogSoftmax": lambda given, told: torch.log_softmax(given[0], told.get("axis", -1)),
    "MatMul": _of(torch.matmul),
    "Max": lambda given, told: reduce(torch.maximum, map(torch.as_tensor, given)),
    "MaxPool": lambda given, told: _pool(given, told, True),
    "Min": lambda given, told: reduce(torch.minimum, map(torch.as_tensor, given)),
    "Mul": _of(mul),
    "Neg": _of(torch.neg),
    "PRelu": lambda given, told: F.prelu(given[0], given[1].flatten()),
    "Pad": _pad,
    "Pow": _of(pow),
    "Reciprocal": _of(torch.reciprocal),
    "ReduceMax": lambda given, told: _reduced(torch.amax, given, told),
    "ReduceMean": lambda given, told: _reduced(torch.mean, given, told),
    "ReduceSum": lambda given, told: _reduced(torch.sum, given, told),
    "Relu": _of(F.relu),
    "Reshape": _reshape,
    "Selu": _of(F.selu),
    "Sigmoid": _of(torch.sigmoid),
    "Slice": _sliced,
    "Softmax": lambda given, told: torch.softmax(given[0], told.get("axis", -1)),
    "Softplus": _of(F.softplus),
    "Split": _part,
    "Sqrt": _of(torch.sqrt),
    "Squeeze": _squeeze,
    "Sub": _of(sub),
    "Sum": lambda given, told: reduce(add, given),
    "Tanh": _of(torch.tanh),
    "Transpose": lambda given, told: given[0].permute(told["perm"]),
    "Unsqueeze": _unsqueeze,
}


class Graph(nn.Module):
    """The operators of an ONNX file, in their order, with one input and one output.

    Args:
        described: what `read_graph` found.
    """

    def __init__(self, described: Mapping[str, Any]) -> None:
        super().__init__()
        self.described = described
        self.plain: dict[str, Value] = dict(described["plain"])
        self.names: dict[str, str] = {}
        for number, (name, told) in enumerate(described["tensors"].items()):
            self.names[name] = key = f"tensor{number}"
            tensor = told["value"].clone()
            if told["trained"]:
                setattr(self, key, nn.Parameter(tensor))
            else:
                self.register_buffer(key, tensor)

    def forward(self, *inputs: Tensor) -> Tensor:
        """Map a batch of the only input to the output; `export` calls with `*tensors`.

        Raises:
            Unsupported: if an operator is used in a way that is not known.
        """
        (x,) = inputs
        found: dict[str, Value] = {self.described["input"]: x, "": None, **self.plain}
        found |= {name: getattr(self, key) for name, key in self.names.items()}
        for operator, names, output, told in self.described["nodes"]:
            given = [found[name] for name in names]
            if operator == "BatchNormalization":  # in training by the batch's own statistics
                found[output] = _normalised(given, told, self.training)
            else:
                found[output] = OPERATORS[operator](given, told)
        result: Tensor = found[self.described["output"]]
        return result


def read_graph(content: Any, output: str, *, logits: bool) -> Graph:
    """Make a module of an ONNX model's path from its input to one of its outputs.

    Args:
        content: an `onnx.ModelProto` with one input, its weights loaded and its constants folded.
        output: the name of the output.
        logits: the output is probabilities; end before their softmax, or take their logarithms.

    Raises:
        Unsupported: if there is an operator that is not known.
    """
    from onnx import numpy_helper

    graph = content.graph
    constants = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
    inputs = [value.name for value in graph.input if value.name not in constants]
    makers = {name: node for node in graph.node for name in node.output}
    last, added = makers.get(output), list[list[Any]]()
    if logits and last is not None and last.op_type == "Softmax":
        output = last.input[0]
    elif logits:
        names = output, f"{output}.positive", f"{output}.log"
        added = [["Clip", [names[0]], names[1], {"min": TINY}], ["Log", [names[1]], names[2], {}]]
    nodes, wanted = [], {output}
    for node in reversed(graph.node):
        if wanted.isdisjoint(node.output):
            continue
        told = _attributes(node)
        if node.op_type not in OPERATORS or node.domain not in ("", "ai.onnx"):
            raise Unsupported(f"its operator {node.op_type} is not known here")
        if node.op_type == "Split":
            for part, name in enumerate(node.output):
                own = {**told, "part": part, "parts": len(node.output)}
                nodes.append([node.op_type, list(node.input), name, own])
        elif wanted.intersection(node.output[1:]):
            raise Unsupported(f"the second output of its operator {node.op_type} is used")
        else:
            nodes.append([node.op_type, list(node.input), node.output[0], told])
        wanted.update(node.input)
    if len(inputs) != 1:
        raise Unsupported("it has several inputs")
    nodes = nodes[::-1] + added
    if _takes_one_query(graph, inputs[0]):
        _free_the_batch(nodes, constants)
    weights = _weights(nodes, constants)
    plain: dict[str, Value] = {}
    tensors: dict[str, Any] = {}
    for name in sorted(wanted & constants.keys()):
        array = constants[name]
        if array.dtype.kind != "f" or (array.ndim == 0 and name not in weights):
            plain[name] = array.tolist()
            continue
        value = torch.from_numpy(array.astype("float32"))
        tensors[name] = {"value": value, "trained": name in weights}
    return Graph(
        {
            "input": inputs[0],
            "output": nodes[-1][2] if nodes else output,
            "nodes": nodes,
            "plain": plain,
            "tensors": tensors,
        }
    )


def _takes_one_query(graph: Any, name: str) -> bool:
    """Tell whether a graph was exported for batches of one."""
    (axes,) = (v.type.tensor_type.shape.dim for v in graph.input if v.name == name)
    return bool(axes) and axes[0].dim_value == 1


def _free_the_batch(nodes: Iterable[Sequence[Any]], constants: dict[str, Any]) -> None:
    """Have reshapes keep any number of queries: 0 stands for the size that an axis has."""
    for operator, inputs, _, told in nodes:
        if operator != "Reshape" or inputs[0] in constants:
            continue
        sizes = constants.get(inputs[1])
        if sizes is not None and sizes.size and sizes[0] == 1:
            constants[inputs[1]] = sizes = sizes.copy()
            sizes[0] = told["allowzero"] = 0


def _weights(nodes: Iterable[Sequence[Any]], constants: Mapping[str, Any]) -> set[str]:
    """Return the names of the constants that are trained."""
    return {
        inputs[place]
        for operator, inputs, _, _ in nodes
        for place in TRAINED.get(operator, ())
        if place < len(inputs) and inputs[place] in constants
    }


def _attributes(node: Any) -> dict[str, Any]:
    """Return a node's attributes as JSON has them."""
    from onnx import helper

    found = {}
    for attribute in node.attribute:
        value = helper.get_attribute_value(attribute)
        if isinstance(value, bytes):
            value = value.decode()
        found[attribute.name] = list(value) if isinstance(value, (list, tuple)) else value
    return found
