"""Passes in bfloat16 while a network trains, on devices that compute in it."""

from __future__ import annotations

import sys
from functools import cache

import torch

from codedinvnet.progress import Progress


def autocast(precision: str, device: torch.device) -> torch.autocast:
    """Return the context in which passes have a precision, or float32 if it would be slower.

    Without instructions for it a processor computes bfloat16 in float32 and converts every value:
    more than twice the time of float32, for coarser sums. A line on stderr says so, once.

    Args:
        precision: "float32" or "bfloat16".
        device: what computes.
    """
    reduced = precision == "bfloat16"
    if reduced and not computes_bfloat16(device.type):
        _tell(device.type)
        reduced = False
    return torch.autocast(device.type, torch.bfloat16, enabled=reduced)


@cache
def computes_bfloat16(device_type: str) -> bool:
    """Return whether a device has instructions for bfloat16; True if PyTorch cannot tell."""
    if device_type == "cuda":
        return torch.cuda.get_device_properties(torch.cuda.current_device()).major >= 8
    asked = getattr(torch.cpu, "get_capabilities", None)
    found = asked() if device_type == "cpu" and asked else {}
    return not found or any(there for name, there in found.items() if "bf16" in name)


@cache
def _tell(device_type: str) -> None:
    Progress.write(
        f"this {device_type} has no instructions for bfloat16: training in float32 instead",
        file=sys.stderr,
    )
