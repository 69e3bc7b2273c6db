"""What a bundle costs: parameters, multiply-adds and times of its parts, as `info` prints them."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from codedinvnet.codes.backup import backup_network, backup_width
from codedinvnet.codes.equal_cost import count_macs
from codedinvnet.common.devices import first_tensor
from codedinvnet.common.provenance import describe_machine
from codedinvnet.models.bundle import Bundle
from codedinvnet.models.coded import decode_missing

REPEATS = 30


def median_ms(call: Callable[[], Any]) -> float:
    """Return the median wall time of a call, in ms, after three calls to warm up."""
    times = []
    with torch.inference_mode():
        for turn in range(REPEATS + 3):
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

    The small backup's figures are of a network of its size: of one image, and of a group.
    """
    model, info = bundle.model, bundle.info
    device = first_tensor(model).device
    generator = torch.Generator().manual_seed(0)

    def noise(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=generator).to(device)

    def count(module: nn.Module) -> int:
        return sum(p.numel() for p in module.parameters())

    x = noise(1, *model.input_shape)
    z = noise(1, *model.latent_shape)
    parts: dict[str, Callable[[], Any]] = {
        "embedding": lambda: model.network(x),
        "head": lambda: model.classify(z),
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
    }
    for m in served:
        backup = backup_network(model, backup_width(model, m)).to(device).eval()
        alone, group = noise(1, *model.input_shape), noise(m, *model.input_shape)
        parts[f"small_backup_one_k{m}"] = lambda net=backup, x=alone: net(x)  # type: ignore[misc]
        parts[f"small_backup_k{m}"] = lambda net=backup, x=group: net(x)  # type: ignore[misc]
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
