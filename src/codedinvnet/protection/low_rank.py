"""Make the layers of a model's graph thinner, by principal components of what they take and give.

A convolution becomes up to three, as in Tucker-2 (Kim et al., ICLR 2016). One of 1 x 1 pixels and a
matrix product become two.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from codedinvnet.codes.equal_cost import count_macs
from codedinvnet.models.graph import Graph

Node = Sequence[Any]
Basis = tuple[Tensor, Tensor]
"""Directions of channels, (C, C) by columns, and the energy of each as a share of all, (C,); the
largest is first."""
Bases = tuple[Basis | None, Basis, float]
"""Of what a layer takes, if its kernel has several pixels, and of what it gives; and its places,
divided by the graph's multiply-adds."""
LAYERS = ("Conv", "Gemm", "MatMul")
EPSILON = 1e-5


@torch.no_grad()
def bases_of(graph: Graph, batches: Iterable[Tensor]) -> dict[str, Bases]:
    """Return bases of what each layer takes and gives for some inputs, by the layer's output."""
    taken, given, shares = dict[str, Tensor](), dict[str, Tensor](), dict[str, float]()
    whole = 0
    for x in batches:
        values = graph.tensors(x)
        whole = whole or count_macs(partial(graph, x[:1]))
        for operator, inputs, output, told in graph.described["nodes"]:
            weight = values[inputs[1]] if operator in LAYERS and inputs[1] in graph.names else None
            if weight is None or weight.ndim not in (2, 4) or told.get("group", 1) != 1:
                continue
            axis, y = 1 if operator == "Conv" else -1, values[output]
            shares[output] = y[0].numel() / y.shape[axis] / whole
            if len(inputs) > 2 and operator != "Conv":
                y = y - values[inputs[2]]
            given[output] = given.get(output, 0) + _energy(y, axis)
            if weight[0, 0].numel() > 1:
                taken[output] = taken.get(output, 0) + _energy(values[inputs[0]], axis)
        del values
    return {
        name: (_basis(taken[name]) if name in taken else None, _basis(energy), shares[name])
        for name, energy in given.items()
    }


def _energy(x: Tensor, axis: int) -> Tensor:
    """Return the second moments of channels, (C, C); of an image's without their means."""
    rows = x.movedim(axis, -1).flatten(0, -2)
    if axis == 1:  # a batch normalisation follows
        rows = rows - rows.mean(0)
    return (rows.T @ rows).double()


def _basis(energy: Tensor) -> Basis:
    found, vectors = torch.linalg.eigh(energy)
    found = found.clamp_min(0).flip(0)
    return vectors.flip(1).float(), found / found.sum().clamp_min(1e-30)


def thinner(graph: Graph, bases: Mapping[str, Bases], price: float, step: int) -> Graph:
    """Return a graph whose layers keep the components that are worth their multiply-adds.

    A component's share of its layer's energy must be `price` times what it adds to the whole graph.
    Their number is rounded up to a multiple of `step`. A layer that would not cost less stays.
    """
    described, nodes = graph.described, list[Node]()
    tensors = dict(described["tensors"])
    for node in described["nodes"]:
        nodes += (
            _thinner(node, tensors, *bases[node[2]], price, step) if node[2] in bases else [node]
        )
    used = {name for _, inputs, *_ in nodes for name in inputs}
    tensors = {name: tensor for name, tensor in tensors.items() if name in used}
    return Graph({**described, "nodes": nodes, "tensors": tensors}).eval()


def _thinner(
    node: Node,
    tensors: dict[str, Any],
    taken: Basis | None,
    given: Basis,
    share: float,
    price: float,
    step: int,
) -> list[Node]:
    """Return the layers that replace one, and add their weights."""
    operator, (name, weight, *bias), output, told = node
    images = operator == "Conv"
    core: Tensor = tensors[weight]["value"]
    if not images and not told.get("transB", 0):
        core = core.T
    whole, area = (core.shape[1], core.shape[0]), core[0, 0].numel()

    def worth(basis: Basis, macs: int) -> int:
        count = int((basis[1] >= price * share * macs).sum())
        return min(len(basis[1]), step * max(1, math.ceil(count / step)))

    first = worth(taken, whole[0] + area * whole[1]) if taken else whole[0]
    last = worth(given, area * whole[0] + whole[1])

    def cost(ranks: Sequence[int]) -> int:
        added = sum(n * rank for n, rank in zip(whole, ranks, strict=True) if rank < n)
        return area * ranks[0] * ranks[1] + added

    ways = whole, (whole[0], last), (first, whole[1]), (first, last)
    first, last = min(ways, key=cost)
    if (first, last) == whole:
        return [node]
    own = {} if images else {"transB": 1}
    parts = {"core": (core, told if images else own)}
    if taken and first < whole[0]:
        basis = taken[0][:, :first]
        core = torch.einsum("oi...,ir->or...", core, basis)
        parts = {"taken": (basis.T, own), "core": (core, parts["core"][1])}
    if last < whole[1]:
        basis = given[0][:, :last]
        core = torch.einsum("oi...,or->ri...", core, basis)
        parts |= {"core": (core, parts["core"][1]), "given": (basis, own)}
    nodes = list[Node]()
    for key, (value, options) in parts.items():
        value = value[..., None, None] if images and key != "core" else value
        tensors[f"{output}.{key}"] = {"value": value.clone(), "trained": True}
        end = len(nodes) == len(parts) - 1
        made = output if end else f"{output}.{key}.output"
        inputs = [name, f"{output}.{key}", *(bias if end else ())]
        nodes.append(["Conv" if images else "Gemm", inputs, made, options])
        name = made
    return nodes


def normalised(graph: Graph, x: Tensor) -> Graph:
    """Add a batch normalisation that changes nothing at first behind each bare convolution.

    Exporters fold normalisations into convolutions, and without them training is slow and frail.
    """
    nodes, tensors = graph.described["nodes"], dict(graph.described["tensors"])
    has_one = {node[1][0] for node in nodes if node[0] == "BatchNormalization"}
    with torch.inference_mode():
        found = graph.tensors(x)
    made = []
    for operator, inputs, output, options in nodes:
        if operator != "Conv" or output in has_one:
            made.append([operator, inputs, output, options])
            continue
        mean, variance = found[output].mean((0, 2, 3)), found[output].var((0, 2, 3), correction=0)
        own = {"scale": (variance + EPSILON).sqrt(), "bias": mean}
        own |= {"mean": mean, "variance": variance}
        for key, value in own.items():
            trained = key in ("scale", "bias")
            tensors[f"{output}.{key}"] = {"value": value.clone(), "trained": trained}
        made.append([operator, inputs, f"{output}.raw", options])
        names = [f"{output}.raw", *(f"{output}.{key}" for key in own)]
        made.append(["BatchNormalization", names, output, {"epsilon": EPSILON}])
    return Graph({**graph.described, "nodes": made, "tensors": tensors}).eval()
