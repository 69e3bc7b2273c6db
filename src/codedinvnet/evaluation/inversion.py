"""How exactly a network inverts its own embeddings, as `invert` prints it."""

from __future__ import annotations

import math
import statistics
import time
from typing import Any

import torch

from codedinvnet.common.devices import first_tensor
from codedinvnet.common.errors import UserError
from codedinvnet.common.progress import Progress
from codedinvnet.common.provenance import describe_machine
from codedinvnet.data import ImageSource
from codedinvnet.models.coded import CodedModel, invertible
from codedinvnet.nn.iresnet import IResNet, IResNetBlock
from codedinvnet.nn.transform import NotConverged

INVERSION_BATCH = 250


def inversion_report(
    model: CodedModel,
    source: ImageSource,
    *,
    tolerance: float = 1e-6,
    max_iterations: int = 200,
    limit: int | None = None,
) -> dict[str, Any]:
    """Embed and invert every image of a source.

    Args:
        model: the model, in evaluation mode.
        source: the images.
        tolerance: of each block's residual, per element.
        max_iterations: of each block.
        limit: only so many images.

    Returns:
        Errors in pixels of 0..1 and iterations over the images that were `measured`, None if none
        was: a batch with an image that did not converge is not. `not_converged` counts images above
        the tolerance in the first block that has any, or whose inverse is not finite. An i-ResNet
        has the `largest_singular_value` of its convolutions, and the `coefficient` that bounds it.
    """
    if limit is not None and limit < 1:
        raise UserError(f"limit must be at least 1 image, got {limit}")
    if not 0 < tolerance < math.inf:  # NaN neither; infinity is no JSON
        raise UserError(f"tolerance must be finite and above 0, got {tolerance}")
    network = invertible(model.network)
    device = first_tensor(model).device
    count = min(len(source), limit or len(source))
    blocks = [m for m in network.modules() if isinstance(m, IResNetBlock)]
    largest, total, measured, failed = 0.0, 0.0, 0, 0
    iterations: list[int] = []
    began = time.monotonic()
    batches = torch.arange(count).split(INVERSION_BATCH)
    for part in Progress(batches, desc="invert", unit="batch", dynamic_ncols=True):
        x = model.prepare(source.batch(part)[0].to(device))
        try:
            with torch.inference_mode():
                back = network.inverse(
                    network(x), tolerance=tolerance, max_iterations=max_iterations
                )
        except NotConverged as error:
            failed += error.samples
            continue
        errors = (back - x).abs()
        if not (finite := errors.flatten(1).isfinite().all(1)).all():
            failed += int((~finite).sum())  # an inverse in closed form is not checked
            continue
        largest = max(largest, float(errors.max()))
        total += float(errors.mean()) * len(part)
        measured += len(part)
        iterations += [block.iterations for block in blocks] or [1]
    report: dict[str, Any] = {
        "images": count,
        "measured": measured,
        "tolerance": tolerance,
        "largest_error": largest if measured else None,
        "mean_error": total / measured if measured else None,
        "iterations": round(statistics.mean(iterations), 2) if measured else None,
        "largest_iterations": max(iterations) if measured else None,
        "not_converged": failed,
        "seconds": round(time.monotonic() - began, 2),
    }
    if isinstance(network, IResNet):
        report["largest_singular_value"] = network.largest_singular_value()
        report["coefficient"] = network.coefficient
    return {**report, "machine": describe_machine()}
