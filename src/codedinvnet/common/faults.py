"""Faults: what can go wrong on a worker, and what a service and a simulation can each inject."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated, Literal, TypeAlias

from pydantic import AfterValidator, Field, model_validator

from codedinvnet.common.config import Positive, Section
from codedinvnet.common.distributions import Distribution
from codedinvnet.common.errors import UserError

OPTIONS: dict[str, tuple[set[str], set[str]]] = {
    "slow": ({"delay"}, {"each_image", "spread"}),
    "hold": ({"delay"}, set()),
    "hang": (set(), set()),
    "crash": (set(), set()),
    "corrupt": (set(), {"scale"}),
    "factor": ({"factor"}, set()),
    "burst": ({"delay", "every_s", "factor", "workers"}, set()),
}
"""Kind -> the options that it needs, and further ones that it may have."""
_OPTIONAL = {name for both in OPTIONS.values() for names in both for name in names}


class Fault(Section):
    """What goes wrong, where and when.

    slow: the worker is blocked; hold: its answer is held back while it goes on; hang: it never
    answers; crash: it dies; corrupt: noise is added to its output; factor: it computes so many
    times slower; burst: every now and then `workers` newly drawn ones compute `factor` times slower
    for a while.
    """

    kind: Literal["slow", "hold", "hang", "crash", "corrupt", "factor", "burst"]
    worker: Annotated[int, Field(ge=0)] | None = None
    """None: every worker."""
    from_s: Annotated[float, Field(ge=0)] = 0.0
    until_s: float | None = None
    """Seconds since the pool started."""
    from_task: Annotated[int, Field(ge=0)] = 0
    until_task: Annotated[int, Field(gt=0)] | None = None
    """Numbers of tasks in the method that are hit: k is that of the first parity."""
    probability: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Of each task to be hit; with `per_request`, of each request."""
    per_request: bool = False
    """Hit one data task of a request, when it is first sent (Dinh & Lee, section 4.3)."""
    delay: Distribution | None = None
    """Of slow and hold; of burst, how long one lasts."""
    each_image: bool = False
    """Of slow: so much for every image of the task, as encoding takes for every one of a group."""
    spread: bool = False
    """Of slow: a random part of the delay comes after the computing instead of before it, so that
    tasks that were given out together do not compute together. Simulations ignore it."""
    scale: Annotated[float, Field(gt=0)] = 1.0
    """Of corrupt: the noise's standard deviation."""
    factor: Annotated[float, Field(gt=0)] | None = None
    """Of factor and burst."""
    every_s: Annotated[float, Field(gt=0)] | None = None
    """Of burst: the mean time from one to the next."""
    workers: Positive | None = None
    """Of burst."""

    @model_validator(mode="after")
    def _fits(self) -> Fault:
        kind, fields = self.kind, type(self).model_fields
        needed, further = OPTIONS[kind]
        given = {name for name in _OPTIONAL if getattr(self, name) != fields[name].default}
        if lacking := sorted(needed - given):
            raise ValueError(f"a fault of kind {kind!r} needs {', '.join(lacking)}")
        if excess := sorted(given - needed - further):
            raise ValueError(f"a fault of kind {kind!r} has no {', '.join(excess)}")
        if self.until_s is not None and self.until_s <= self.from_s:
            raise ValueError(f"until_s {self.until_s:g} is not after from_s {self.from_s:g}")
        if self.until_task is not None and self.until_task <= self.from_task:
            raise ValueError(
                f"until_task {self.until_task} is not above from_task {self.from_task}"
            )
        if self.per_request and kind in ("factor", "burst"):
            raise ValueError(f"a fault of kind {kind!r} is not per_request")
        if kind == "burst" and (self.worker is not None or self.probability != 1):
            raise ValueError("a burst draws its workers and when it comes: no worker, probability")
        return self

    def hits(self, worker: int, now: float) -> bool:
        """Tell whether it is on for a worker at this time (seconds since the start)."""
        on = self.from_s <= now and (self.until_s is None or now < self.until_s)
        return on and self.worker in (None, worker)

    def concerns(self, number: int) -> bool:
        """Tell whether it can hit the task of this number."""
        return self.from_task <= number and (self.until_task is None or number < self.until_task)


def _injected(fault: Fault) -> Fault:
    if fault.kind in ("factor", "burst"):
        raise ValueError(f"faults of kind {fault.kind!r} are only simulated")
    return fault


def _simulated(fault: Fault) -> Fault:
    if fault.kind == "corrupt":
        raise ValueError("faults of kind 'corrupt' are not simulated")
    for name in ("from_task", "until_task", "each_image", "spread"):
        if getattr(fault, name):
            raise ValueError(f"{name} is not simulated")
    return fault


Injected: TypeAlias = Annotated[Fault, AfterValidator(_injected)]
"""A fault that a running service can inject."""
Simulated: TypeAlias = Annotated[Fault, AfterValidator(_simulated)]
"""A fault that a simulation can inject."""


def check_workers(faults: Iterable[Fault], size: int) -> None:
    """Make sure that faults name none but the workers that there are."""
    for fault in faults:
        if fault.worker is not None and fault.worker >= size:
            raise UserError(f"the faults name worker {fault.worker}; there are {size}")
