"""Straggler models by name, and from files."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError, model_validator

from codedinvnet.config import Positive, Section, validated
from codedinvnet.errors import UserError
from codedinvnet.files import read_json
from codedinvnet.serving.workers.faults import FaultWindow
from codedinvnet.simulation.distributions import Distribution


class Straggler(FaultWindow):
    """Why some answers are late. A faults file's `slow`, `hold`, `hang` and `crash` mean the same.

    slow: the worker is blocked before it computes; hold: its answer is held back while it goes on;
    hang: it never answers; crash: it dies; factor: it computes so many times slower; burst: every
    now and then `workers` of them, drawn anew, compute `factor` times slower for a while.
    """

    kind: Literal["slow", "hold", "hang", "crash", "factor", "burst"]
    probability: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Of each task to be hit; with `per_request`, of each request."""
    per_request: bool = False
    """Hit one data task of a request, when it is first sent (Dinh & Lee, section 4.3)."""
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
        """Drop what a fault of the service says besides, and nothing is simulated of.

        That is `scale`, which is of corruption alone, `spread`, and which tasks it hits if it is
        all. A fault that corrupts, hits some tasks alone, or takes its time for every image is
        refused.
        """
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


Model = tuple[Straggler, ...]


def _none(service_ms: float, batch: int) -> Model:
    return ()


def _held(service_ms: float, batch: int) -> Model:
    delay = Distribution(ms=100.0)
    share = min(1.0, 0.01 * batch)
    return (Straggler(kind="hold", probability=share, per_request=True, delay=delay),)


def _exponential(service_ms: float, batch: int) -> Model:
    delay = Distribution(distribution="exponential", ms=5 * service_ms)
    return (Straggler(kind="slow", probability=0.02, delay=delay),)


def _pareto(service_ms: float, batch: int) -> Model:
    delay = Distribution(distribution="pareto", ms=2 * service_ms, shape=1.5)
    return (Straggler(kind="slow", probability=0.01, delay=delay),)


def _slower(service_ms: float, batch: int) -> Model:
    return (Straggler(kind="factor", worker=0, factor=3.0),)


def _bursts(service_ms: float, batch: int) -> Model:
    lasts = Distribution(distribution="exponential", ms=20 * service_ms)
    every = service_ms / 5  # seconds: a tenth of the time one is on
    return (Straggler(kind="burst", factor=5.0, workers=3, every_s=every, delay=lasts),)


def _hung(service_ms: float, batch: int) -> Model:
    # One task of worker 0 in a thousand never ends; the service replaces the worker.
    return (Straggler(kind="hang", worker=0, probability=0.001),)


STRAGGLERS: dict[str, Callable[[float, int], Model]] = {
    "none": _none,
    "held": _held,
    "exponential": _exponential,
    "pareto": _pareto,
    "slower": _slower,
    "bursts": _bursts,
    "hung": _hung,
}
"""Name -> model, given the mean service time in ms and the images of a request.

none: nobody straggles. held: one data task in a hundred is answered 100 ms late, at most one of a
request, which for requests of ten is the paper's model (Dinh & Lee, section 4.3). exponential: 2 %
of the tasks block their worker for five service times in the mean. pareto: 1 % block it for at
least two, with a tail of exponent 1.5. slower: worker 0 is three times slower for good. bursts:
three workers at once, drawn anew, compute five times slower for 20 service times in the mean, every
200. hung: one task in a thousand of worker 0 never ends.
"""


class FaultsFile(Section):
    """A faults file of the service, or one with the simulator's stragglers."""

    seed: int = 0
    faults: tuple[Straggler, ...]


def stragglers(name: str, service_ms: float, batch: int) -> Model:
    """Return a straggler model by its name, or from a faults file.

    Args:
        name: of STRAGGLERS, or a path; of several at once joined by +.
        service_ms: the mean service time.
        batch: images of a request.

    Raises:
        UserError: if it is neither.
    """
    if name in STRAGGLERS:
        try:
            return STRAGGLERS[name](service_ms, batch)
        except ValidationError as error:  # of a time that is infinite, times a service's
            raise UserError(
                f"stragglers {name!r}: not with a service of {service_ms:g} ms and requests of "
                f"{batch} images"
            ) from error
    path = Path(name)
    if "+" in name and not path.is_file():
        return tuple(one for part in name.split("+") for one in stragglers(part, service_ms, batch))
    if not path.is_file():
        raise UserError(f"stragglers {name!r}: neither a file nor one of {', '.join(STRAGGLERS)}")
    raw: Any = read_json(path)
    return validated(FaultsFile, raw, path).faults
