"""What `invert` and `info` measure of a model, and the JSON that `evaluate` prints."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from codedinvnet.bundle import Bundle, describe_machine
from codedinvnet.codes.equal_cost import count_macs
from codedinvnet.codes.invnet import CodedInvNet
from codedinvnet.codes.mean import Evidence
from codedinvnet.codes.method import given_by
from codedinvnet.data import ImageSource
from codedinvnet.errors import UserError
from codedinvnet.evaluation import Evaluation, evaluate
from codedinvnet.model import CodedModel, decode_missing
from codedinvnet.nn.iresnet import IResNet, IResNetBlock
from codedinvnet.nn.transform import NotConverged

INVERSION_BATCH = 250
REPEATS = 30


def evaluation_report(
    bundle: Bundle,
    source: ImageSource,
    *,
    split: str,
    k: int,
    groupings: int = 5,
    seed: int = 0,
    evidence: Evidence = "both",
    pixel_mean: bool = False,
    shuffle_parity: bool = False,
    progress: bool = True,
) -> dict[str, Any]:
    """Evaluate a bundle at one group size and return what `evaluate --json` prints.

    Raises:
        UserError: if the bundle cannot be evaluated so.
    """
    if pixel_mean and evidence == "side":
        raise UserError("the average image has no side features, so that nothing would be left")
    used = bundle.with_pixel_mean() if pixel_mean else bundle
    result = evaluate(
        CodedInvNet().build(given_by(used, k), evidence),
        source,
        k=k,
        groupings=groupings,
        seed=seed,
        shuffle_parity=shuffle_parity,
        progress=progress,
    )
    arm = "pixel mean" if pixel_mean else "encoder"
    return {
        "bundle": bundle.info.name,
        "dataset": source.name,
        "split": split,
        "evidence": evidence,
        "parity": arm + (", shuffled" if shuffle_parity else ""),
        "seed": seed,
        **figures(result),
        "position_accuracies": [round(a, 6) for a in result.position_accuracies],
        "machine": describe_machine(),
    }


def figures(result: Evaluation) -> dict[str, Any]:
    """Return an evaluation's figures, rounded to what they can carry."""
    return {
        "images": result.images,
        "k": result.k,
        "groupings": result.groupings,
        "normal_accuracy": round(result.normal_accuracy, 6),
        "recovered_accuracy": round(result.recovered_accuracy, 6),
        "recovered_accuracy_std": round(result.recovered_accuracy_std, 6),
        "worst_position_accuracy": round(result.worst_position_accuracy, 6),
        "agreement": round(result.agreement, 6),
    }


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
        model: in evaluation mode.
        source: the images.
        tolerance: of each block's residual, per element.
        max_iterations: of each block.
        limit: only so many images.

    Returns:
        `images` that were to be inverted and `measured` ones that were (a batch with an image that
        did not converge is not), `largest_error` (over all pixels, pixels in 0..1), `mean_error`,
        `iterations` (mean over blocks and batches of the slowest sample's; 1 without such blocks),
        `largest_iterations`, `not_converged` (images above the tolerance, of a batch those in the
        first block that has any, or whose inverse is not finite), and for an i-ResNet
        `largest_singular_value` of all convolutions with the `coefficient` that bounds it. Errors
        and iterations are None if nothing was measured.

    Raises:
        UserError: if the tolerance is not above 0, or the limit below 1.
    """
    if limit is not None and limit < 1:
        raise UserError(f"limit must be at least 1 image, got {limit}")
    if not 0 < tolerance < math.inf:  # NaN neither; infinity is no JSON
        raise UserError(f"tolerance must be finite and above 0, got {tolerance}")
    network = model.network
    device = next(model.parameters()).device
    count = min(len(source), limit or len(source))
    blocks = [m for m in network.modules() if isinstance(m, IResNetBlock)]
    largest, total, measured, failed = 0.0, 0.0, 0, 0
    iterations: list[int] = []
    began = time.monotonic()
    rows = torch.arange(count)
    with tqdm(total=count, desc="invert", unit="image", dynamic_ncols=True) as bar:
        for part in rows.split(INVERSION_BATCH):
            images, _ = source.batch(part)
            x = model.prepare(images.to(device))
            with torch.inference_mode():
                try:
                    back = network.inverse(
                        network(x), tolerance=tolerance, max_iterations=max_iterations
                    )
                except NotConverged as error:
                    failed += error.samples
                    bar.update(len(part))
                    continue
            error_ = (back - x).abs()
            if not (finite := error_.flatten(1).isfinite().all(1)).all():
                failed += int((~finite).sum())  # an inverse in closed form is not checked
                bar.update(len(part))
                continue
            largest = max(largest, float(error_.max()))
            total += float(error_.mean()) * len(part)
            measured += len(part)
            iterations += [block.iterations for block in blocks] or [1]
            bar.update(len(part))
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


def encoder_share(model: CodedModel, k: int) -> float:
    """Return what E costs for k images in embeddings, by their multiply-adds."""
    device = next(model.parameters()).device
    group = torch.zeros(1, k, *model.input_shape, device=device)
    return count_macs(lambda: model.encoder(group)) / count_macs(lambda: model.network(group[:, 0]))


def median_ms(call: Callable[[], Any], repeats: int = REPEATS) -> float:
    """Return the median wall time of a call, in ms, after three calls to warm up."""
    times = []
    with torch.inference_mode():
        for turn in range(repeats + 3):
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            began = time.perf_counter()
            call()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            if turn >= 3:
                times.append(time.perf_counter() - began)
    return round(statistics.median(times) * 1000, 3)


def info_report(bundle: Bundle, sizes: tuple[int, ...] = (2, 4, 10)) -> dict[str, Any]:
    """Return a bundle's description, parameters, multiply-adds and times of one query each.

    `reading` is what a mosaic's parity worker does with a group's z_p for the recovery head.
    """
    model, info = bundle.model, bundle.info
    device = next(model.parameters()).device
    generator = torch.Generator().manual_seed(0)

    def noise(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=generator).to(device)

    def count(module: nn.Module | None) -> int:
        return sum(p.numel() for p in module.parameters()) if module is not None else 0

    x = noise(1, *model.input_shape)
    z = noise(1, *model.latent_shape)
    smallest = info.group_sizes[0]
    side = bundle.encode(noise(1, smallest, *info.input.shape)).side[:, 0]
    features = noise(1, smallest, info.model.encoder.side_features)
    parts: dict[str, Callable[[], Any]] = {
        "embedding": lambda: model.network(x),
        "head": lambda: model.classify(z),
        "recovery_head": lambda: model.recover(z, side, smallest),
        "reading": lambda: model.parity(z, features),
    }
    served = [m for m in sizes if m in info.group_sizes]
    for m in served:
        group, others = noise(1, m, *model.input_shape), noise(1, m - 1, *model.latent_shape)
        parts[f"encoder_k{m}"] = lambda group=group: model.encoder(group)  # type: ignore[misc]
        parts[f"decoding_k{m}"] = lambda others=others: decode_missing(z, others)  # type: ignore[misc]
    report: dict[str, Any] = {
        "bundle": info.name,
        "format_version": info.format_version,
        "classes": list(info.classes),
        "input": info.input.model_dump(),
        "latent_shape": list(model.latent_shape),
        "group_sizes": list(info.group_sizes),
        "embedding_parameters": count(model.network),
        "head_parameters": count(model.head),
        "encoder_parameters": count(model.encoder),
        "recovery_head_parameters": count(model.recovery_head),
    }
    for name, call in parts.items():
        stem, _, size = name.partition("_k")
        suffix = f"_k{size}" if size else ""
        if stem != "decoding":  # sums only
            report[f"{stem}_macs{suffix}"] = count_macs(call)
        report[f"{stem}_ms{suffix}"] = median_ms(call)
    return {
        **report,
        "provenance": info.provenance.model_dump(mode="json"),
        "figures": info.figures,
        "machine": describe_machine(),
    }
