"""What models cost: multiply-adds, counted in their ONNX graph, and measured times."""

from __future__ import annotations

import copy
import math
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from codedinvnet.common.errors import UserError
from codedinvnet.models import OpenModel
from codedinvnet.models.onnx_file import whole_onnx
from codedinvnet.models.runtime import any_batch, export

COUNTED = ("Conv", "ConvTranspose", "Gemm", "MatMul", "FusedConv", "FusedMatMul")
"""ONNX operators whose multiply-adds are counted."""
HEAVY = (
    *("Attention", "ConvInteger", "DeformConv", "Det", "Einsum", "GRU", "If", "LSTM", "Loop"),
    *("LinearClassifier", "LinearRegressor", "MatMulInteger", "QLinearConv", "QLinearMatMul"),
    *("RNN", "SVMClassifier", "SVMRegressor", "Scan", "TreeEnsemble"),
    *("TreeEnsembleClassifier", "TreeEnsembleRegressor"),
)
"""Operators that do real work and aren't counted; the work of all others is negligible."""
DOMAINS = ("", "ai.onnx", "ai.onnx.ml")
PER_MS = 2_000_000
"""Multiply-adds that a millisecond stands for where they can't be counted: a small network does
about as many on one thread."""
TIMED = 15
"""Timings of each call; ranks 4 and 12 enclose the median with a probability of 0.965."""


class Milliseconds(NamedTuple):
    """A median time with its 95 % interval."""

    median: float
    low: float
    high: float


class Cost(NamedTuple):
    """What the served model costs for one query."""

    macs: int | None
    ms: Milliseconds
    why: str = ""
    """Why multiply-adds can't be counted; "" if they can."""

    def share(self, work: float) -> int:
        """Return the multiply-adds of a share of this cost."""
        return int(work * (self.macs or PER_MS * self.ms.median))


@contextmanager
def one_thread() -> Iterator[None]:
    """Have PyTorch compute on one thread, as servers do, while something is measured."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def milliseconds(calls: Mapping[str, Callable[[], object]]) -> dict[str, Milliseconds]:
    """Time warm calls in turn, so that a slow moment of the machine affects all of them."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        call()
    for _ in range(TIMED):
        for name, call in calls.items():
            began = time.perf_counter()
            call()
            times[name].append(1e3 * (time.perf_counter() - began))
    return {
        name: Milliseconds(statistics.median(found), sorted(found)[3], sorted(found)[11])
        for name, found in times.items()
    }


def model_cost(model: OpenModel, one: Mapping[str, np.ndarray], content: Callable[[], Any]) -> Cost:
    """Measure a model on one query; `content` returns it as ONNX, or raises UserError."""
    (ms,) = milliseconds({"": lambda: model.run(one)}).values()
    try:
        return Cost(onnx_macs(content(), {name: array.shape for name, array in one.items()}), ms)
    except UserError as error:
        return Cost(None, ms, str(error))


def as_onnx(model: OpenModel, batch: Mapping[str, np.ndarray]) -> Any:
    """Return a model as an `onnx.ModelProto`; PyTorch exports its own with a batch of queries."""
    import onnx

    if model.source.kind == "onnx":
        return whole_onnx(Path(model.source.source))
    if model.network is None:
        raise UserError("only its server has its weights")
    content = export(
        model.network,
        [torch.from_numpy(array) for array in batch.values()],
        input_names=list(batch),
        output_names=[spec.name for spec in model.signature.outputs],
        dynamic_shapes=any_batch(len(batch)),
    )
    return onnx.load_from_string(content)


def folded(content: Any) -> Any:
    """Return an ONNX model whose constants ONNX Runtime has folded.

    Classic exporters compute paddings and shapes by nodes, and no shape is inferred through them.
    """
    import onnx
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
    options.log_severity_level = 3
    with tempfile.TemporaryDirectory() as folder:
        options.optimized_model_filepath = str(Path(folder) / "model.onnx")
        try:
            onnxruntime.InferenceSession(
                content.SerializeToString(), options, providers=["CPUExecutionProvider"]
            )
        except Exception:  # ONNX Runtime has many; then the nodes stay
            return content
        return onnx.load(options.optimized_model_filepath)


def onnx_macs(model: Any, shapes: Mapping[str, tuple[int, ...]]) -> int:
    """Count the multiply-adds for inputs of certain shapes; UserError says why it can't be done."""
    from onnx import shape_inference

    model = copy.deepcopy(model)
    for value in model.graph.input:
        if value.name in shapes:
            axes = value.type.tensor_type.shape
            del axes.dim[:]
            for size in shapes[value.name]:
                axes.dim.add().dim_value = size
    for value in model.graph.output:
        value.type.tensor_type.ClearField("shape")
    del model.graph.value_info[:]  # inferred again, for one query
    model = folded(model)
    del model.graph.value_info[:]
    try:
        graph = shape_inference.infer_shapes(model, data_prop=True).graph
    except Exception as error:  # of its C++ part
        raise UserError("onnx cannot infer its shapes") from error
    known: dict[str, list[int]] = {t.name: list(t.dims) for t in graph.initializer}
    for value in [*graph.input, *graph.value_info, *graph.output]:
        known[value.name] = [axis.dim_value for axis in value.type.tensor_type.shape.dim]
    total = sum(_node_macs(node, known) for node in graph.node)
    if not total:
        raise UserError("it has no convolution or matrix product")
    return total


def _node_macs(node: Any, known: Mapping[str, list[int]]) -> int:
    if node.op_type not in COUNTED:
        if node.op_type in HEAVY or node.domain not in DOMAINS:
            name = f"{node.domain}.{node.op_type}".lstrip(".")
            raise UserError(f"the work of its operator {name} is not known")
        return 0
    first, second, output = (known.get(n) or [0] for n in (*node.input[:2], node.output[0]))
    if node.op_type.endswith("MatMul") and len(second) == 2:
        work = math.prod(first) * second[1]
    elif node.op_type.endswith("MatMul"):
        work = math.prod(output) * first[-1]
    elif node.op_type == "Gemm":
        transposed = any(a.name == "transA" and a.i for a in node.attribute)
        work = math.prod(output) * first[0 if transposed else -1]
    else:
        transposed = node.op_type == "ConvTranspose"
        work = math.prod(first if transposed else output) * math.prod(second[1:])
    if not work:
        raise UserError(f"the shapes around its {node.op_type} {node.name!r} cannot be inferred")
    return work
