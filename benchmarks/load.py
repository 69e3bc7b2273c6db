"""`python -m benchmarks load`: the latency of any HTTP server under an open-loop load."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

from codedinvnet.common.errors import UserError
from codedinvnet.evaluation.load import Load
from codedinvnet.simulation.arrivals import poisson_gaps


def run(*, url: str, body: Path | None, rate: float, seconds: float, seed: int) -> dict[str, Any]:
    """Send requests at Poisson times; return percentiles, errors and goodput.

    Raises:
        UserError: if the rate or the duration is not positive, or the body cannot be read.
    """
    if not (rate > 0 and seconds > 0):
        raise UserError("--rate, --seconds: must be above 0")
    try:
        bodies = [] if body is None else [body.read_bytes()]
    except OSError as error:
        raise UserError(f"--body: cannot read {body}: {error.strerror}") from error
    gaps = poisson_gaps(rate, max(1, round(rate * seconds)), seed)
    load = Load([url], bodies, (("Content-Type", "application/json"),))
    return asyncio.run(load.run(gaps, url))
