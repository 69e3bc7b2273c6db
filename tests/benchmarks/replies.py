"""Replies of a service that was never started."""

from __future__ import annotations

import numpy as np

from codedinvnet.bench.load import Reply


def canned(latency: float, count: int) -> list[Reply]:
    return [
        Reply(
            f"q{i}", (i % 10,), latency * (1 + i / count), 200, f"q{i}", np.array([0]), ("direct",)
        )
        for i in range(count)
    ]
