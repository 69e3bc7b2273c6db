"""`python -m benchmarks outside`: a service and a gateway, tried by those who mean them no good.

Workers are killed and stopped, requests are malformed, clients are slow, bodies are bombs, and far
more is asked than can be answered. Behind the gateway, upstreams answer with other requests'
content, hang, reply with what is hard to read, or are not found. What is counted is what clients
see.
"""

from __future__ import annotations

import asyncio
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.outside.counts import Count, table


async def harm(log: Path, *, quick: bool, only: str | None = None) -> list[Count]:
    """Harm a service and a gateway, or only one of them; return the parts' counts."""
    from benchmarks.outside import proxied, served  # each only where it is needed: PyTorch is slow

    counts: list[Count] = []
    if only != "gateway":
        counts += await served.run(served.QUICK if quick else served.Sizes(), log)
    if only != "serve":
        counts += await proxied.run(proxied.QUICK if quick else proxied.SECONDS, log)
    return counts


def run(*, quick: bool, only: str | None = None) -> dict[str, Any]:
    """Run it all, and return the table and its rows."""
    with tempfile.TemporaryDirectory() as folder:
        counts = asyncio.run(harm(Path(folder) / "log", quick=quick, only=only))
    return {"table": table(counts), "rows": [asdict(count) for count in counts]}
