"""When requests come, and how large they are."""

from __future__ import annotations

import math
from typing import Annotated, Literal

import numpy as np
from pydantic import Field

from codedinvnet.common.config import Positive, Section


class Arrivals(Section):
    """When requests come. `qps` counts images, of which a request brings `batch`.

    `bursts` alternates between calm and busy times of exponential length: while it is busy the
    rate is `burst_factor` times the calm one, and the mean over both is `qps`. `uneven` has gaps of
    the coefficient of variation `cv`, of two exponential laws with balanced means. `steps` changes
    the rate in mid-run: it is `qps` times each of `steps` for as many requests.
    """

    kind: Literal["poisson", "uniform", "bursts", "uneven", "steps"] = "poisson"
    qps: Annotated[float, Field(gt=0)]
    batch: Positive = 1
    burst_factor: Annotated[float, Field(ge=1)] = 3.0
    burst_ms: Annotated[float, Field(gt=0)] = 1000.0
    calm_ms: Annotated[float, Field(gt=0)] = 9000.0
    cv: Annotated[float, Field(gt=1)] = 5.0
    steps: Annotated[tuple[Annotated[float, Field(gt=0)], ...], Field(min_length=1)] = (0.5, 1.5)

    def draw(self, generator: np.random.Generator, count: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the times in seconds at which requests come, and their images, each (count,)."""
        return self.times(generator, count), np.full(count, self.batch)

    def times(self, generator: np.random.Generator, count: int) -> np.ndarray:
        """Return the times (count,) in seconds at which requests come, ascending."""
        rate = self.qps / self.batch
        if self.kind == "uniform":
            return np.arange(1, count + 1) / rate
        gaps = generator.standard_exponential(count)
        if self.kind == "uneven":
            more = (1 + math.sqrt((self.cv**2 - 1) / (self.cv**2 + 1))) / 2
            often = generator.random(count) < more
            return np.cumsum(gaps / np.where(often, 2 * more, 2 * (1 - more))) / rate
        if self.kind == "steps":
            factors = [self.steps[i * len(self.steps) // count] for i in range(count)]
            return np.cumsum(gaps / factors) / rate
        units = np.cumsum(gaps)  # Poisson at rate 1
        if self.kind == "poisson":
            return units / rate
        # The same events on a clock that runs faster while it is busy.
        calm, busy = self.calm_ms / 1000, self.burst_ms / 1000
        slow = rate * (calm + busy) / (calm + self.burst_factor * busy)
        cycles = math.ceil(units[-1] / (slow * (calm + busy))) + 1
        times, passed = [np.zeros(1)], [np.zeros(1)]
        while passed[-1][-1] < units[-1]:
            lengths = generator.standard_exponential((cycles, 2)) * (calm, busy)
            rates = np.array([slow, slow * self.burst_factor])
            times.append(times[-1][-1] + np.cumsum(lengths))
            passed.append(passed[-1][-1] + np.cumsum(lengths * rates))
        return np.interp(units, np.concatenate(passed), np.concatenate(times))
