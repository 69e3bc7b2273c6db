"""Services under load: started, sent images, and driven to the rate that they just keep up with."""

from __future__ import annotations

import json
import random
import statistics
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.serve_figures import latencies
from codedinvnet.bench.load import WARM_REQUESTS, Client, Reply, connect, open_loop, server, warm
from codedinvnet.errors import UserError
from codedinvnet.quantiles import percentile

CAPACITY_SERVICE_TIMES = 5.0
"""Capacity is the highest rate at which p99 stays under so many service times."""
REDUCTIONS = 12
"""So often the search for the capacity lowers a rate that was too high from the start."""


class Loader:
    """Starts services of one bundle and sends them images.

    Args:
        name: of the bundle, as `serve` takes it.
        model: the bundle's own name, by which the service knows it.
        images: (N, C, H, W) uint8, what to send.
        seed: of arrivals, and of which images a request sends.
        log: where the servers' logs go.
        capacity_seconds: how long each rate is tried in the search for the capacity.
    """

    def __init__(
        self,
        name: str,
        model: str,
        images: np.ndarray,
        seed: int,
        log: Path,
        capacity_seconds: float,
    ) -> None:
        self.name, self.model, self.images, self.seed, self.log = name, model, images, seed, log
        self.capacity_seconds = capacity_seconds

    def rows(self, request: int, count: int) -> list[int]:
        """Return which images a request sends."""
        generator = random.Random(f"{self.seed}/{request}")
        return [generator.randrange(len(self.images)) for _ in range(count)]

    async def load(
        self,
        client: Client,
        *,
        rate: float,
        count: int,
        size: int,
        label: str,
        poisson: bool = True,
        seed: int | None = None,
    ) -> list[Reply]:
        """Send requests of `size` images at Poisson times, or evenly spaced."""
        seed = self.seed if seed is None else seed

        async def call(i: int, due: float) -> Reply:
            return await client.infer(f"{label}-{i}", self.rows(i, size), due)

        return await open_loop(
            call, rate=rate, count=count, seed=seed, label=label, poisson=poisson
        )

    async def warm(self, client: Client, size: int = 1) -> None:
        """Let every worker and path run once.

        Raises:
            UserError: if one of the answers is an error.
        """
        await warm(client, (self.rows(i, size) for i in range(WARM_REQUESTS)), self.log)

    async def _arm(
        self,
        options: Sequence[str],
        *,
        rate: float,
        count: int,
        size: int,
        label: str,
        faults: Mapping[str, Any] | None = None,
        poisson: bool = True,
        seed: int | None = None,
    ) -> list[Reply]:
        """Serve with these options and faults, and load it."""
        with tempfile.TemporaryDirectory() as folder:
            extra: list[str] = ["--workers", "11", "--k", "10"]
            if faults is not None:
                path = Path(folder) / "faults.json"
                path.write_text(json.dumps(faults), encoding="utf-8")
                extra += ["--faults", str(path)]
            async with (
                server(self.name, *options, *extra, log=self.log) as process,
                connect(process.address, self.model, self.images) as client,
            ):
                await self.warm(client, size)
                return await self.load(
                    client,
                    rate=rate,
                    count=count,
                    size=size,
                    label=label,
                    poisson=poisson,
                    seed=seed,
                )

    async def _capacity(self, size: int) -> float:
        """Return the highest rate of requests of `size` images that an uncoded service keeps up.

        Raises:
            UserError: if it keeps none up.
        """
        best, reductions = 0.0, 0
        async with (
            server(self.name, "--policy", "uncoded", "--workers", "11", log=self.log) as process,
            connect(process.address, self.model, self.images) as client,
        ):
            await self.warm(client, size)
            # The service time: the median latency of a request that meets an idle service.
            idle = [await client.infer(f"idle-{i}", self.rows(i, size)) for i in range(50)]
            service = statistics.median(reply.latency for reply in idle)
            rate = 0.5 / service
            while True:
                if await self._keeps_up(client, rate, size, CAPACITY_SERVICE_TIMES * service):
                    best, rate = rate, rate * 1.25
                elif best:
                    return best
                elif reductions == REDUCTIONS:
                    raise UserError(
                        f"an uncoded service does not keep up with {rate:.2g} requests of {size} "
                        f"images a second: their p99 stays above {CAPACITY_SERVICE_TIMES:g} times "
                        f"the {1000 * service:.1f} ms of an idle one; stop what else is running, "
                        f"and see {self.log}"
                    )
                else:
                    rate, reductions = rate / 1.5, reductions + 1

    async def _keeps_up(self, client: Client, rate: float, size: int, limit: float) -> bool:
        """Tell whether p99 stays within a limit (seconds); a second try counts, too.

        One pause of the machine is enough to spoil a p99.
        """
        count = max(50, round(rate * self.capacity_seconds))
        for turn in range(2):
            replies = await self.load(
                client,
                rate=rate,
                count=count,
                size=size,
                label=f"capacity at {rate:.0f}/s",
                seed=self.seed + turn,
            )
            if percentile(latencies(replies), 0.99) <= 1000 * limit and all(r.ok for r in replies):
                return True
        return False
