"""Passes in bfloat16 while a network trains, on devices where that is faster."""

from __future__ import annotations

import sys
import time
from functools import cache
from typing import NamedTuple

import torch
import torch.nn.functional as F

from codedinvnet.progress import Progress

TURNS = 3
"""A precision's time is the shortest of so many, after one that does not count."""
CLEARLY = 0.9
"""bfloat16 is chosen if it takes less than this share of float32's time. It took 0.6 of it on some
processors, and 1.4 on others."""


class Verdict(NamedTuple):
    """Whether to train in bfloat16 where it is asked for."""

    faster: bool
    why: str
    """The reason, in a line for the log; "" if there is nothing to tell."""


def autocast(precision: str, device: torch.device) -> torch.autocast:
    """Return the context in which passes have a precision, or float32 if that is as fast.

    Where bfloat16 is asked for, a line on stderr says once which of the two was chosen, and why.
    The choice is the device's. So a run that is resumed on another one may go on in the other
    precision.

    Args:
        precision: "float32" or "bfloat16".
        device: what computes.
    """
    reduced = False
    if precision == "bfloat16":
        reduced, why = judge_bfloat16(device.type)
        _tell(why)
    return torch.autocast(device.type, torch.bfloat16, enabled=reduced)


@cache
def judge_bfloat16(device_type: str) -> Verdict:
    """Return whether training in bfloat16 is faster on a device, and why; found once a process.

    A processor without instructions for it converts every value: more than twice float32's time.
    One with instructions may be slower as well, so a convolution is timed in both precisions.
    """
    if not computes_bfloat16(device_type):
        why = f"this {device_type} has no instructions for bfloat16: training in float32 instead"
        return Verdict(False, why)
    if device_type != "cpu":
        return Verdict(True, "")
    dtypes = (torch.float32, torch.bfloat16)
    turns = [[step_seconds(dtype) for dtype in dtypes] for _ in range(1 + TURNS)][1:]
    plain, reduced = (min(seconds) for seconds in zip(*turns, strict=True))
    share = reduced / plain
    chosen = "bfloat16" if share < CLEARLY else "float32 instead"
    why = f"bfloat16 takes {share:.2f} of float32's time on this cpu: training in {chosen}"
    return Verdict(share < CLEARLY, why)


@cache
def computes_bfloat16(device_type: str) -> bool:
    """Return whether a device has instructions for bfloat16; True if PyTorch cannot tell."""
    if device_type == "cuda":
        return torch.cuda.get_device_properties(torch.cuda.current_device()).major >= 8
    asked = getattr(torch.cpu, "get_capabilities", None)
    found = asked() if device_type == "cpu" and asked else {}
    return not found or any(there for name, there in found.items() if "bf16" in name)


def step_seconds(dtype: torch.dtype) -> float:
    """Return the processor's time of a convolution, forward and backward, that autocasts to a type.

    It is that of this process, which others that run at the same time hardly change.
    """
    images = torch.ones(64, 64, 16, 16, requires_grad=True)
    kernel = torch.full((64, 64, 3, 3), 1 / 576, requires_grad=True)
    began = time.process_time()
    with (
        torch.enable_grad(),
        torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16),
    ):
        F.conv2d(images, kernel, padding=1).float().sum().backward()
    return time.process_time() - began


@cache
def _tell(why: str) -> None:
    if why:
        Progress.write(why, file=sys.stderr)
