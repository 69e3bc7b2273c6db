"""A student that is the served model itself, on images of a smaller size.

It begins with the served model's weights, so that what a model of many classes knows need not be
learnt from a few thousand inputs.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from codedinvnet.errors import UserError, one_line
from codedinvnet.models import OpenModel
from codedinvnet.models.graph import Graph, Unsupported, read_graph
from codedinvnet.models.onnx_file import whole_onnx
from codedinvnet.models.runtime import any_batch, export
from codedinvnet.protect import costs
from codedinvnet.protect.images import layout
from codedinvnet.protect.students import Shape
from codedinvnet.protect.teacher import scores_of

SMALLEST = 24
"""Images of a smaller side show too little to be tried."""
_CLOSE = 1e-2
"""Share of the largest score by which the graph's may differ from the model's."""


def graph_of(model: OpenModel, batch: dict[str, np.ndarray]) -> Graph:
    """Return the served model's graph up to its logits, with its weights.

    Args:
        model: the served model.
        batch: some queries, for which both must agree.

    Raises:
        Unsupported: if there is no such graph; the message says why.
    """
    signature, source = model.signature, model.source
    if len(signature.inputs) != 1:
        raise Unsupported("it has several inputs")
    assert signature.scores is not None
    try:
        import onnx  # noqa: F401
    except ImportError as error:
        raise Unsupported("onnx is not installed: pip install 'codedinvnet[onnx]'") from error
    if source.kind == "onnx":
        content, output = whole_onnx(Path(source.source)), signature.scores.output
    elif model.network is not None:
        content, output = _exported(model, batch)
    else:
        raise Unsupported("nobody but its server has its weights")
    probabilities = signature.scores.kind == "probabilities"
    graph = read_graph(content, output, logits=probabilities)
    (array,) = batch.values()
    wanted = scores_of(model, batch)
    try:
        with torch.inference_mode():
            scores = graph(torch.from_numpy(array).float())
    except Unsupported:
        raise
    except Exception as error:  # PyTorch has many for what does not fit
        raise Unsupported(f"its graph cannot be computed here: {one_line(error)}") from error
    found = (scores.softmax(1) if probabilities else scores).numpy()
    close = _CLOSE * np.abs(wanted).max()
    if found.shape != wanted.shape or not np.abs(found - wanted).max() <= close:  # NaN neither
        raise Unsupported("its graph gives other scores here than where it is served")
    return graph


def _exported(model: OpenModel, batch: dict[str, np.ndarray]) -> tuple[Any, str]:
    """Export a module as ONNX; return the model and the name of its scores."""
    import onnx

    names = [spec.name for spec in model.signature.outputs]
    (array,) = batch.values()
    try:
        content = export(
            model.network,
            [torch.from_numpy(array)],
            output_names=names,
            dynamic_shapes=any_batch(1),
        )
    except UserError as error:
        raise Unsupported(str(error)) from error
    assert model.signature.scores is not None
    return onnx.load_from_string(content), model.signature.scores.output


def shrunk_shape(full: Shape, graph: Graph, budget: int) -> Shape:
    """Return the shape with the largest images at which the model costs no more than allowed.

    Args:
        full: a shape of the model's inputs and classes.
        graph: the model's.
        budget: multiply-adds for a query.

    Raises:
        Unsupported: if it would be too small, or its size cannot be changed.
    """
    (spec,) = full.inputs
    height, width = spec.shape[:2] if layout(spec)[1] else spec.shape[1:]

    def at(side: int) -> Shape:
        size = (side, max(1, round(width * side / height)))
        return replace(full, graph=graph.described, size=size)

    side, least = height, SMALLEST * max(1.0, height / width)
    try:
        while side >= least and (macs := costs.student_macs(at(side).build().eval())) > budget:
            side = min(side - 1, int(side * (budget / macs) ** 0.5) + 2)  # never too far
    except (RuntimeError, IndexError, ValueError) as error:
        raise Unsupported("it takes images of one size only") from error
    if side < least:
        raise Unsupported(f"images would have fewer than {SMALLEST} pixels a side")
    return at(side)
