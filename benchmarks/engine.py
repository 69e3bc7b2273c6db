"""`python -m benchmarks engine`: what a worker's tasks take by PyTorch, and by ONNX Runtime."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import torch

from benchmarks.timing import Sizes, interleave, ratio, summary
from codedinvnet.devices import first_tensor
from codedinvnet.models.bundle import Bundle
from codedinvnet.models.runtime import ONNX_RUNTIME, PYTORCH, check_engine, check_installed
from codedinvnet.serving.served import IMAGES
from codedinvnet.serving.workers.computing import OUTPUT, BundleSpec

NAMES = {PYTORCH: "PyTorch", ONNX_RUNTIME: "ONNX Runtime"}
"""What the arms are called."""


def compare(bundle: Bundle, name: str, sizes: Sizes) -> dict[str, Any]:
    """Time a query's task and a full group's parity, of noise, with its scaling and padding.

    Args:
        bundle: that the name stands for.
        name: of a shipped bundle, or a folder.
        sizes: how much is measured.

    Raises:
        UserError: if ONNX Runtime is not installed, or the bundle is not on a processor.
    """
    device = first_tensor(bundle.model).device
    check_engine(ONNX_RUNTIME, str(device))
    check_installed(ONNX_RUNTIME)
    k, threads = bundle.info.group_sizes[-1], torch.get_num_threads()
    computers = {
        arm: BundleSpec(name, k, threads=threads, engine=engine).load()
        for engine, arm in NAMES.items()
    }
    generator = torch.Generator().manual_seed(0)
    shape = (k, *bundle.info.input.shape)
    group = torch.randint(256, shape, generator=generator, dtype=torch.uint8).numpy()
    report: dict[str, Any] = {"engine_k": k}
    for task, number, queries in (
        ("query", 0, {IMAGES: group[:1]}),
        ("parity", k, {IMAGES: group}),
    ):
        calls = {arm: partial(one.compute, number, queries) for arm, one in computers.items()}
        times = interleave(
            calls,
            rounds=sizes.rounds,
            seconds=sizes.seconds,
            device=device,
            label=f"engine, {task}",
        )
        expected, found = (calls[arm]()[0][OUTPUT] for arm in NAMES.values())
        report |= ratio(f"engine_ratio_{task}", times, *NAMES.values())
        report[f"engine_ms_{task}"] = {arm: summary(values) for arm, values in times.items()}
        report[f"engine_difference_{task}"] = {
            NAMES[ONNX_RUNTIME]: float(np.abs(found - expected).max())
        }
    return report
