"""What models cost: multiply-adds, counted as ONNX Runtime computes a query, and measured times."""

from __future__ import annotations

import math
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from codedinvnet.common.errors import UserError, one_line
from codedinvnet.common.files import read_json
from codedinvnet.models import OpenModel
from codedinvnet.models.onnx_file import export

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


class Interval(NamedTuple):
    """A share, or a median time, with its 95 % interval."""

    value: float
    low: float
    high: float


class Cost(NamedTuple):
    """What the served model costs for one query."""

    macs: int | None
    ms: Interval
    why: str = ""
    """Why multiply-adds can't be counted; "" if they can."""

    def share(self, work: float) -> int:
        """Return the multiply-adds of a share of this cost."""
        return int(work * (self.macs or PER_MS * self.ms.value))


def milliseconds(calls: Mapping[str, Callable[[], object]]) -> dict[str, Interval]:
    """Time warm calls in turn, so that a slow moment of the machine affects all of them."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        call()
    for _ in range(TIMED):
        for name, call in calls.items():
            began = time.perf_counter()
            call()
            times[name].append(1e3 * (time.perf_counter() - began))
    ranked = {name: sorted(found) for name, found in times.items()}
    return {n: Interval(found[TIMED // 2], found[3], found[11]) for n, found in ranked.items()}


def model_cost(model: OpenModel, one: Mapping[str, np.ndarray], content: Callable[[], Any]) -> Cost:
    """Measure a model on one query; `content` returns it as ONNX, or raises."""
    ms = milliseconds({"": lambda: model.run(one)})[""]
    try:
        return Cost(onnx_macs(content(), one), ms)
    except Exception as error:  # PyTorch's exporter and ONNX Runtime have many
        return Cost(None, ms, one_line(error))


def as_onnx(model: OpenModel, batch: Mapping[str, np.ndarray]) -> Any:
    """Return a model as an `onnx.ModelProto`, whose constants ONNX Runtime has folded.

    PyTorch exports its own with a batch of queries. Classic exporters compute paddings by nodes.
    """
    import onnx
    import onnxruntime

    content: str | bytes = model.source.source
    if model.source.kind == "factory":
        examples = {name: torch.from_numpy(array) for name, array in batch.items()}
        content = export(model.network, examples, [s.name for s in model.signature.outputs])
    options, providers = onnxruntime.SessionOptions(), ["CPUExecutionProvider"]
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
    options.log_severity_level = 3
    for given in onnxruntime.InferenceSession(content, options, providers=providers).get_inputs():
        sizes = 1, *batch[given.name].shape[1:]
        for name, size in zip(given.shape, sizes, strict=False):
            if isinstance(name, str):
                options.add_free_dimension_override_by_name(name, size)
    # Weights next to the file are copied to one next to the other.
    options.add_session_config_entry(
        "session.optimized_model_external_initializers_file_name", "weights"
    )
    with tempfile.TemporaryDirectory() as folder:
        options.optimized_model_filepath = str(Path(folder) / "model.onnx")
        onnxruntime.InferenceSession(
            content,
            options,
            providers=providers,
            disabled_optimizers=["MatMulAddFusion"],  # its reshapes fix the number of queries
        )
        return onnx.load(options.optimized_model_filepath)


def onnx_macs(model: Any, one: Mapping[str, np.ndarray]) -> int:
    """Count the multiply-adds of a query by the shapes that ONNX Runtime's profile reports.

    Raises:
        UserError: if the work of an operator is not known.
    """
    import onnxruntime

    for node in model.graph.node:
        heavy = node.op_type in HEAVY or node.domain not in DOMAINS
        if heavy and node.op_type not in COUNTED:
            name = f"{node.domain}.{node.op_type}".lstrip(".")
            raise UserError(f"the work of its operator {name} is not known")
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.add_session_config_entry("session.disable_prepacking", "1")  # it hides weights' shapes
    options.enable_profiling = True
    with tempfile.TemporaryDirectory() as folder:
        options.profile_file_prefix = str(Path(folder) / "profile")
        content, providers = model.SerializeToString(), ["CPUExecutionProvider"]
        session = onnxruntime.InferenceSession(content, options, providers=providers)
        session.run(None, dict(one))
        events = read_json(Path(session.end_profiling()))
    computed = (event["args"] for event in events if event["name"].endswith("_kernel_time"))
    total = sum(_macs(told) for told in computed if told["op_name"] in COUNTED)
    if not total:
        raise UserError("it has no convolution or matrix product")
    return total


def _macs(told: Mapping[str, Any]) -> int:
    """Return the multiply-adds of an operator from its shapes, each as {datatype: sizes}."""
    shapes = [*told["input_type_shape"][:2], *told["output_type_shape"]]
    sizes: list[list[int]] = [found for shape in shapes for found in shape.values()]
    first, second, output = sizes[:3]
    if told["op_name"] == "ConvTranspose":
        return math.prod(first) * math.prod(second[1:])
    if told["op_name"] == "Gemm":  # the first may be transposed
        return math.prod(first) * math.prod(output) // output[0]
    return math.prod(output) * (first[-1] if "MatMul" in told["op_name"] else math.prod(second[1:]))
