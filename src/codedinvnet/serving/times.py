"""The times that a simulation of the service needs, sampled while it serves."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING, Any

from codedinvnet.evaluation.quantiles import SHARES, quantiles

if TYPE_CHECKING:  # a simulation does without what computes
    from codedinvnet.serving.workers.result import Result

RESERVOIR = 20_000
"""Values kept of each kind of time."""


class Reservoir:
    """A uniform sample of all values that came, in bounded memory (Vitter, 1985, algorithm R).

    Args:
        size: how many values are kept.
    """

    def __init__(self, size: int = RESERVOIR) -> None:
        self.size = size
        self.seen = 0
        self.values: list[float] = []
        self._random = random.Random(0)

    def add(self, value: float) -> None:
        """Take a value in."""
        self.seen += 1
        if len(self.values) < self.size:
            self.values.append(value)
        elif (place := self._random.randrange(self.seen)) < self.size:
            self.values[place] = value

    def distribution(self) -> dict[str, Any]:
        """Return the values, in seconds, as a distribution of a scenario file.

        Raises:
            ValueError: if there is none.
        """
        return {
            "distribution": "empirical",
            "values_ms": quantiles([max(0.0, 1000 * v) for v in tuple(self.values)], digits=4),
            "shares": list(SHARES),
        }


class Times:
    """Samples of what tasks take, in seconds, split as a scenario of `simulate` splits them.

    Attributes:
        service: computing of data tasks.
        encode: encoding of a parity query, for each image of its group; without a value for a
            code that encodes nothing, and for one without direct answers, whose every task encodes
            as part of `service`.
        trip: what a worker was occupied beyond computing and injected delays: the way there and
            back, and waits for a processor.
    """

    def __init__(self) -> None:
        self.service, self.encode, self.trip = Reservoir(), Reservoir(), Reservoir()

    def add_data(self, result: Result, occupied: float) -> None:
        """Add a data task's times; `occupied` is the seconds that its worker was busy."""
        self.trip.add(occupied - result.seconds - result.blocked)
        self.service.add(result.seconds)

    def add_parity(self, result: Result, occupied: float, members: int, encodes: bool) -> None:
        """Add a parity task's times; `encodes` says whether no other kind of task encodes."""
        self.trip.add(occupied - result.seconds - result.blocked)
        if encodes and result.encode_seconds > 0:
            self.encode.add(result.encode_seconds / members)

    def report(self) -> dict[str, Any]:
        """Return the distributions; those without a value are left out.

        May be called in a thread while values come.
        """
        kinds = {"service": self.service, "encode": self.encode, "trip": self.trip}
        return {name: kept.distribution() for name, kept in kinds.items() if kept.seen}
