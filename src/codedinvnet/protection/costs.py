"""What models cost: the time of one query as it is served, in turn with the served model's."""

from __future__ import annotations

import math
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from codedinvnet.models import OpenModel
from codedinvnet.models.onnx_file import export

FEWEST, MOST, SECONDS = 15, 200, 0.5
"""Timings of each call: at least, at most, and for how long if there may be more."""
MOST_TIME = 0.5
"""Share of the model's time that a backup may take: above it a copy of the model is better."""


class Interval(NamedTuple):
    """A share, or a median time, with its 95 % interval."""

    value: float
    low: float
    high: float


def too_slow(work: float) -> str:
    """Return why a backup that takes this share of the model's time is not used; "" if it is."""
    if work <= MOST_TIME:
        return ""
    return (
        f"it takes {work:.2f} of the model's time, and above {MOST_TIME:g} a copy of the model is "
        "better: use hedging (policy hedge)"
    )


def milliseconds(calls: Mapping[str, Callable[[], object]]) -> dict[str, Interval]:
    """Time warm calls in turn, so that a slow moment of the machine affects all of them."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        call()
    start = time.perf_counter()
    for count in range(MOST):
        if count >= FEWEST and time.perf_counter() - start > SECONDS:
            break
        for name, call in calls.items():
            began = time.perf_counter()
            call()
            times[name].append(1e3 * (time.perf_counter() - began))
    return {name: _median(sorted(found)) for name, found in times.items()}


def _median(ranked: list[float]) -> Interval:
    """Return the median, and the ranks around it that enclose the true one with 95 %."""
    middle, width = (len(ranked) - 1) / 2, 0.98 * math.sqrt(len(ranked))
    low, high = max(0, math.floor(middle - width)), min(len(ranked) - 1, math.ceil(middle + width))
    return Interval(float(np.median(ranked)), ranked[low], ranked[high])


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
