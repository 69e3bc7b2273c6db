"""What models cost: multiply-adds where they can be counted, and measured times."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from torch import nn

from codedinvnet.codes.equal_cost import all_macs, count_macs
from codedinvnet.engines import PYTORCH
from codedinvnet.models import OpenModel
from codedinvnet.nn.resnet import width_of_cost
from codedinvnet.protect.students import Shape, Student, tensors

COUNTED = ("Conv", "ConvTranspose", "Gemm", "MatMul")
"""ONNX operators whose multiply-adds are counted."""
HEAVY = (
    *("Attention", "ConvInteger", "DeformConv", "Det", "Einsum", "GRU", "If", "LSTM", "Loop"),
    *("LinearClassifier", "LinearRegressor", "MatMulInteger", "QLinearConv", "QLinearMatMul"),
    *("RNN", "SVMClassifier", "SVMRegressor", "Scan", "TreeEnsemble"),
    *("TreeEnsembleClassifier", "TreeEnsembleRegressor"),
)
"""Those whose work is not little, and is not counted; that of all others is."""
KNOWN_DOMAINS = ("", "ai.onnx", "ai.onnx.ml")
WIDTHS = (4, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256)
"""Widths that are tried where time decides."""
MOST_WEIGHTS = 2**26
"""Weights of a network at most: for vectors it has about one for each multiply-add."""
FREE = 1.25
"""A student that takes at most so many times as long as the smallest one is as good as free."""
TIMED = 15

Network = TypeVar("Network", bound=nn.Module)


class Milliseconds(NamedTuple):
    """A median time, with its 95 % interval."""

    median: float
    low: float
    high: float


def milliseconds(calls: Mapping[str, Callable[[], object]]) -> dict[str, Milliseconds]:
    """Time calls in turn, so that a slow moment meets all of them."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        call()
    for _ in range(TIMED):
        for name, call in calls.items():
            began = time.perf_counter()
            call()
            times[name].append(1e3 * (time.perf_counter() - began))
    # Ranks 4 and 12 of 15 hold the median with a probability of 0.965.
    return {
        name: Milliseconds(statistics.median(found), sorted(found)[3], sorted(found)[11])
        for name, found in times.items()
    }


def model_macs(model: OpenModel, batch: dict[str, np.ndarray]) -> int | None:
    """Return a model's multiply-adds for one query; None if they cannot be counted.

    Args:
        model: any.
        batch: one query.
    """
    source = model.source
    if source.kind == "onnx":
        return onnx_macs(Path(source.source), {n: array.shape for n, array in batch.items()})
    if source.engine == PYTORCH:
        with _no_fused_layers():
            return all_macs(lambda: model.run(batch)) or None
    return None


@contextmanager
def _no_fused_layers() -> Iterator[None]:
    """Let recurrent layers and attention be made of matrix products, which are counted."""
    mkldnn: Any = torch.backends.mkldnn  # its `flags` would set others, too, and warn of them
    enabled, fast = mkldnn.enabled, torch.backends.mha.get_fastpath_enabled()
    try:
        mkldnn.enabled = False
        torch.backends.mha.set_fastpath_enabled(False)
        yield
    finally:
        mkldnn.enabled = enabled
        torch.backends.mha.set_fastpath_enabled(fast)


def onnx_macs(path: Path, shapes: Mapping[str, tuple[int, ...]]) -> int | None:
    """Count the multiply-adds of an ONNX file; None if it has operators that are not counted.

    Args:
        path: the file.
        shapes: name -> of an input, with a batch of 1.
    """
    import onnx
    from onnx import shape_inference

    model = onnx.load(path, load_external_data=False)
    for value in model.graph.input:
        if value.name in shapes:
            axes = value.type.tensor_type.shape
            del axes.dim[:]
            for size in shapes[value.name]:
                axes.dim.add().dim_value = size
    del model.graph.value_info[:]  # of a free batch; those of one query are found anew
    for value in model.graph.output:
        value.type.tensor_type.ClearField("shape")
    try:
        graph = shape_inference.infer_shapes(model, data_prop=True).graph
    except Exception:  # of its C++ part
        return None
    known: dict[str, list[int]] = {t.name: list(t.dims) for t in graph.initializer}
    for value in [*graph.input, *graph.value_info, *graph.output]:
        known[value.name] = [axis.dim_value for axis in value.type.tensor_type.shape.dim]
    total = 0
    for node in graph.node:
        if node.op_type not in COUNTED:
            if node.op_type in HEAVY or node.domain not in KNOWN_DOMAINS:
                return None
            continue
        first, second, output = (known.get(n) or [0] for n in (*node.input[:2], node.output[0]))
        if node.op_type == "MatMul" and len(second) == 2:
            work = math.prod(first) * second[1]
        elif node.op_type == "MatMul":
            work = math.prod(output) * first[-1]
        elif node.op_type == "Gemm":
            turned = any(a.name == "transA" and a.i for a in node.attribute)
            work = math.prod(output) * first[0 if turned else -1]
        else:
            work = math.prod(output if node.op_type == "Conv" else first) * math.prod(second[1:])
        if not work:  # an axis that nobody knows
            return None
        total += work
    return total or None


def student_macs(student: Student) -> int:
    """Return a student's multiply-adds for one query."""
    inputs = [torch.zeros(1, *spec.shape) for spec in student.shape.inputs]
    return count_macs(lambda: student(*inputs))


def width_by_macs(shape: Callable[[int], Shape], budget: int) -> int:
    """Return the largest width of a student that costs no more than so many multiply-adds."""
    return largest_width(lambda width: shape(width).build().eval(), student_macs, budget)


def largest_width(
    make: Callable[[int], Network], macs: Callable[[Network], int], budget: int
) -> int:
    """Return the largest width of a network that costs no more, and has no more than MOST_WEIGHTS.

    Args:
        make: makes the network of a width; its weights take no memory here.
        macs: counts its multiply-adds.
        budget: multiply-adds.
    """

    def cost(width: int) -> int:
        with torch.device("meta"):
            network = make(width)
            weights = sum(weight.numel() for weight in network.parameters())
            return macs(network) if weights <= MOST_WEIGHTS else budget + 1

    return width_of_cost(cost, budget)


def width_by_time(
    shape: Callable[[int], Shape], batch: dict[str, np.ndarray], budget: float
) -> int:
    """Return the largest of WIDTHS with which a student takes no more than so many milliseconds.

    Args:
        shape: returns a student's shape of a width.
        batch: a batch of one group's queries.
        budget: the milliseconds that the batch may take.
    """
    chosen, free = WIDTHS[0], 0.0
    for width in WIDTHS:
        student = shape(width).build().eval()
        inputs = tensors(student.shape, batch)
        with torch.inference_mode():
            (found,) = milliseconds({"": partial(student, *inputs)}).values()
        free = free or FREE * found.median
        if found.median > max(budget, free):
            break
        chosen = width
    return chosen
