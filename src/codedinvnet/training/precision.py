"""Passes in bfloat16 while a network trains, on devices that compute in it."""

from __future__ import annotations

import sys
from functools import cache

import torch

from codedinvnet.common.progress import Progress


def autocast(precision: str, device: torch.device) -> torch.autocast:
    """Return the context in which passes have a precision.

    A device without instructions for bfloat16 would take more than twice float32's time, so it
    trains in float32, and a line on stderr says so once.
    """
    reduced = precision == "bfloat16" and computes_bfloat16(device.type)
    return torch.autocast(device.type, torch.bfloat16, enabled=reduced)


@cache
def computes_bfloat16(device_type: str) -> bool:
    """Tell whether a device has instructions for bfloat16; True if PyTorch does not know."""
    if device_type == "cuda":
        found = torch.cuda.get_device_properties(torch.cuda.current_device()).major >= 8
    else:
        asked = getattr(torch.cpu, "get_capabilities", None)
        known = asked() if device_type == "cpu" and asked else {}
        found = not known or any(there for name, there in known.items() if "bf16" in name)
    if not found:
        told = f"this {device_type} has no instructions for bfloat16: training in float32 instead"
        Progress.write(told, file=sys.stderr)
    return found
