"""The times that a simulation of the service needs, sampled while it serves."""

from __future__ import annotations

import random
from typing import Any

from codedinvnet.quantiles import SHARES, quantiles

RESERVOIR = 20_000
"""Values kept of each kind of time."""


class Reservoir:
    """A uniform sample of all values that came, in bounded memory (Vitter, 1985, algorithm R).

    Args:
        size: how many values are kept.
        seed: of the choice.
    """

    def __init__(self, size: int = RESERVOIR, seed: int = 0) -> None:
        self.size = size
        self.seen = 0
        self.values: list[float] = []
        self._random = random.Random(seed)

    def add(self, value: float) -> None:
        """Take a value in."""
        self.seen += 1
        if len(self.values) < self.size:
            self.values.append(value)
        elif (place := self._random.randrange(self.seen)) < self.size:
            self.values[place] = value


class Times:
    """Samples of what tasks take, in seconds, split as a scenario of `simulate` splits them.

    Attributes:
        service: computing of data tasks.
        encode: encoding of a parity query, for each image of its group.
        trip: what a worker was occupied beyond computing and injected delays: the way there and
            back, and waits for a processor.
    """

    def __init__(self) -> None:
        self.service, self.encode, self.trip = Reservoir(), Reservoir(), Reservoir()

    def distributions(self) -> dict[str, dict[str, Any]]:
        """Return them as distributions of a scenario file; those without a value are left out."""
        kinds = {"service": self.service, "encode": self.encode, "trip": self.trip}
        return {
            name: {
                "distribution": "empirical",
                "values_ms": quantiles([max(0.0, 1000 * v) for v in kept.values], digits=4),
                "shares": list(SHARES),
            }
            for name, kept in kinds.items()
            if kept.seen
        }
