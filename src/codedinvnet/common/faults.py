"""Faults: what can go wrong on a worker, and what a service and a simulation can each inject."""

from __future__ import annotations

import random
from collections.abc import Iterable
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from codedinvnet.common.config import Positive, Section
from codedinvnet.common.distributions import Distribution
from codedinvnet.common.errors import UserError


class Delay(Section):
    """A distribution of delays, in ms."""

    distribution: Literal["constant", "exponential", "pareto"] = "constant"
    ms: Annotated[float, Field(ge=0)]
    """The delay, the mean, or the Pareto scale (the least delay)."""
    shape: Annotated[float, Field(gt=0)] = 1.5
    """The Pareto shape; the smaller, the heavier the tail."""

    def draw(self, generator: random.Random) -> float:
        """Return a delay in seconds."""
        if self.distribution == "exponential":
            return self.ms * generator.expovariate(1.0) / 1000
        if self.distribution == "pareto":
            return self.ms * generator.paretovariate(self.shape) / 1000
        return self.ms / 1000


class FaultWindow(Section):
    """Where and when something goes wrong."""

    worker: Annotated[int, Field(ge=0)] | None = None
    """None: every worker."""
    from_s: Annotated[float, Field(ge=0)] = 0.0
    until_s: float | None = None
    """Seconds since the pool started."""

    @model_validator(mode="after")
    def _ends_after_it_begins(self) -> FaultWindow:
        if self.until_s is not None and self.until_s <= self.from_s:
            raise ValueError(f"until_s {self.until_s:g} is not after from_s {self.from_s:g}")
        return self

    def hits(self, worker: int, now: float) -> bool:
        """Tell whether it is on for a worker at this time (seconds since the start)."""
        on = self.from_s <= now and (self.until_s is None or now < self.until_s)
        return on and self.worker in (None, worker)


class Cause(FaultWindow):
    """A fault that a running service can inject and a simulation can repeat."""

    probability: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Of each task to be hit; with `per_request`, of each request."""
    per_request: bool = False
    """Hit one data task of a request, when it is first sent (Dinh & Lee, section 4.3)."""


OPTIONS = {
    "delay": ("slow", "hold"),
    "each_image": ("slow",),
    "spread": ("slow",),
    "scale": ("corrupt",),
}
"""Options of a fault that not every kind has."""


class Fault(Cause):
    """What a running service can inject."""

    kind: Literal["slow", "hold", "hang", "crash", "corrupt"]
    """slow: the worker is blocked; hold: its answer is held back while it goes on; hang: it never
    answers; crash: it dies; corrupt: noise is added to its output."""
    from_task: Annotated[int, Field(ge=0)] = 0
    until_task: Annotated[int, Field(gt=0)] | None = None
    """Numbers of tasks in the method that are hit: k is that of the first parity."""
    delay: Delay | None = None
    """Of slow and hold."""
    each_image: bool = False
    """Of slow: so much for every image of the task, as encoding takes for every one of a group."""
    spread: bool = False
    """Of slow: a random part of the delay comes after the computing instead of before it, so that
    tasks that were given out together do not compute together."""
    scale: Annotated[float, Field(gt=0)] = 1.0
    """Of corrupt: the noise's standard deviation."""

    @model_validator(mode="after")
    def _delayed(self) -> Fault:
        if self.kind in ("slow", "hold") and self.delay is None:
            raise ValueError(f"a fault of kind {self.kind!r} needs a delay")
        for option, kinds in OPTIONS.items():
            default = type(self).model_fields[option].default
            if self.kind not in kinds and getattr(self, option) != default:
                words = " and ".join(map(repr, kinds))
                raise ValueError(f"{option} is an option of kind {words}, not of {self.kind!r}")
        if self.until_task is not None and self.until_task <= self.from_task:
            raise ValueError(
                f"until_task {self.until_task} is not above from_task {self.from_task}"
            )
        return self

    def concerns(self, number: int) -> bool:
        """Tell whether it can hit the task of this number."""
        return self.from_task <= number and (self.until_task is None or number < self.until_task)


class Straggler(Cause):
    """What a simulation can inject. `slow`, `hold`, `hang` and `crash` mean the same as in `Fault`.

    slow: the worker is blocked before it computes; hold: its answer is held back while it goes on;
    hang: it never answers; crash: it dies; factor: it computes so many times slower; burst: every
    now and then `workers` newly drawn ones compute `factor` times slower for a while.
    """

    kind: Literal["slow", "hold", "hang", "crash", "factor", "burst"]
    delay: Distribution | None = None
    """Of slow and hold; of burst, how long one lasts."""
    factor: Annotated[float, Field(gt=0)] | None = None
    """Of factor and burst."""
    every_s: Annotated[float, Field(gt=0)] | None = None
    """Of burst: the mean time from one to the next."""
    workers: Positive | None = None
    """Of burst."""

    @model_validator(mode="before")
    @classmethod
    def _as_the_services(cls, raw: Any) -> Any:
        """Ignore the options of a `Fault` that change nothing here, and refuse the others."""
        if not isinstance(raw, dict):
            return raw
        if raw.get("kind") == "corrupt":
            raise ValueError("faults of kind 'corrupt' are not simulated")
        others = {key for key in ("from_task", "until_task", "each_image") if not raw.get(key)}
        return {k: value for k, value in raw.items() if k not in {"scale", "spread", *others}}

    @model_validator(mode="after")
    def _has_what_it_needs(self) -> Straggler:
        needed = {
            "slow": ("delay",),
            "hold": ("delay",),
            "factor": ("factor",),
            "burst": ("delay", "factor", "every_s", "workers"),
        }.get(self.kind, ())
        given = {"delay", "factor", "every_s", "workers"} & {
            name for name, value in self if value is not None
        }
        if given != set(needed):
            has = ", ".join(needed) or "none of delay, factor, every_s and workers"
            raise ValueError(f"a straggler of kind {self.kind!r} has {has}")
        if self.per_request and self.kind not in ("slow", "hold", "hang", "crash"):
            raise ValueError(f"a straggler of kind {self.kind!r} is not per_request")
        if self.kind == "burst" and (self.worker is not None or self.probability != 1):
            raise ValueError("a burst draws its workers and when it comes: no worker, probability")
        return self


def check_workers(faults: Iterable[Fault], size: int) -> None:
    """Make sure that faults name none but the workers that there are."""
    for fault in faults:
        if fault.worker is not None and fault.worker >= size:
            raise UserError(f"the faults name worker {fault.worker}; there are {size}")
