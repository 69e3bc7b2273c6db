"""What models cost: multiply-adds, counted for any ONNX file, and measured times."""

from __future__ import annotations

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

from codedinvnet.codes.equal_cost import all_macs
from codedinvnet.common.engines import PYTORCH
from codedinvnet.models import OpenModel
from codedinvnet.models.onnx_file import whole_onnx

COUNTED = ("Conv", "ConvTranspose", "Gemm", "MatMul", "FusedConv", "FusedMatMul")
"""ONNX operators whose multiply-adds are counted."""
HEAVY = (
    *("Attention", "ConvInteger", "DeformConv", "Det", "Einsum", "GRU", "If", "LSTM", "Loop"),
    *("LinearClassifier", "LinearRegressor", "MatMulInteger", "QLinearConv", "QLinearMatMul"),
    *("RNN", "SVMClassifier", "SVMRegressor", "Scan", "TreeEnsemble"),
    *("TreeEnsembleClassifier", "TreeEnsembleRegressor"),
)
"""Operators that do real work and are not counted; the work of all others is negligible."""
DOMAINS = ("", "ai.onnx", "ai.onnx.ml")
TIMED = 15
"""Timings of each call; ranks 4 and 12 hold the median with a probability of 0.965."""


class Uncounted(Exception):
    """Multiply-adds cannot be counted; the message says why."""


class Milliseconds(NamedTuple):
    """A median time, with its 95 % interval."""

    median: float
    low: float
    high: float


class Cost(NamedTuple):
    """What the served model costs for one query."""

    macs: int | None
    ms: Milliseconds
    why: str = ""
    """Why multiply-adds cannot be counted; "" if they can."""


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
    """Time warm calls in turn, so that a slow moment of the machine meets all of them."""
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


def model_cost(model: OpenModel, batch: dict[str, np.ndarray]) -> Cost:
    """Measure a model on one query."""
    (ms,) = milliseconds({"": lambda: model.run(batch)}).values()
    try:
        return Cost(model_macs(model, batch), ms)
    except Uncounted as error:
        return Cost(None, ms, str(error))


def model_macs(model: OpenModel, batch: dict[str, np.ndarray]) -> int:
    """Count the multiply-adds of one query.

    Raises:
        Uncounted: saying why it cannot be done.
    """
    source = model.source
    if source.kind == "onnx":
        return onnx_macs(Path(source.source), {n: array.shape for n, array in batch.items()})
    if source.engine != PYTORCH:
        raise Uncounted(f"a model on {source.engine} can only be timed")
    with _no_fused_layers():
        found = all_macs(lambda: model.run(batch))
    if not found:
        raise Uncounted("it has PyTorch operators whose work is not known")
    return found


@contextmanager
def _no_fused_layers() -> Iterator[None]:
    """Have recurrent layers and attention computed by matrix products, which are counted."""
    mkldnn: Any = torch.backends.mkldnn  # its `flags` would set others, too, and warn of them
    enabled, fast = mkldnn.enabled, torch.backends.mha.get_fastpath_enabled()
    try:
        mkldnn.enabled = False
        torch.backends.mha.set_fastpath_enabled(False)
        yield
    finally:
        mkldnn.enabled = enabled
        torch.backends.mha.set_fastpath_enabled(fast)


def folded(content: Any) -> Any:
    """Return an ONNX model with its constants folded, as ONNX Runtime folds them.

    Classic exporters compute paddings and shapes by nodes, through which no shape is inferred.
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


def onnx_macs(path: Path, shapes: Mapping[str, tuple[int, ...]]) -> int:
    """Count the multiply-adds of an ONNX file for inputs of certain shapes.

    Raises:
        Uncounted: naming the operator that is not known.
    """
    from onnx import shape_inference

    model = whole_onnx(path)
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
        raise Uncounted("onnx cannot infer its shapes") from error
    known: dict[str, list[int]] = {t.name: list(t.dims) for t in graph.initializer}
    for value in [*graph.input, *graph.value_info, *graph.output]:
        known[value.name] = [axis.dim_value for axis in value.type.tensor_type.shape.dim]
    total = sum(_node_macs(node, known) for node in graph.node)
    if not total:
        raise Uncounted("it has no convolution or matrix product")
    return total


def _node_macs(node: Any, known: Mapping[str, list[int]]) -> int:
    if node.op_type not in COUNTED:
        if node.op_type in HEAVY or node.domain not in DOMAINS:
            name = f"{node.domain}.{node.op_type}".lstrip(".")
            raise Uncounted(f"the work of its operator {name} is not known")
        return 0
    first, second, output = (known.get(n) or [0] for n in (*node.input[:2], node.output[0]))
    if node.op_type.endswith("MatMul") and len(second) == 2:
        work = math.prod(first) * second[1]
    elif node.op_type.endswith("MatMul"):
        work = math.prod(output) * first[-1]
    elif node.op_type == "Gemm":
        turned = any(a.name == "transA" and a.i for a in node.attribute)
        work = math.prod(output) * first[0 if turned else -1]
    else:
        transposed = node.op_type == "ConvTranspose"
        work = math.prod(first if transposed else output) * math.prod(second[1:])
    if not work:
        raise Uncounted(f"the shapes around its {node.op_type} {node.name!r} cannot be inferred")
    return work
