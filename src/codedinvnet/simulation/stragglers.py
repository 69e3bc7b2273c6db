"""Straggler models by name, and from files."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from codedinvnet.common.config import Section, validated
from codedinvnet.common.distributions import Distribution
from codedinvnet.common.errors import UserError
from codedinvnet.common.faults import Fault, Simulated
from codedinvnet.common.files import read_json

Model = tuple[Fault, ...]


def _delay(kind: str, ms: float) -> Distribution:
    return Distribution.model_validate({"distribution": kind, "ms": ms})


STRAGGLERS: Mapping[str, Callable[[float, int], Model]] = {
    "none": lambda service_ms, batch: (),
    "held": lambda service_ms, batch: (
        Fault(
            kind="hold",
            probability=min(1.0, 0.01 * batch),
            per_request=True,
            delay=_delay("constant", 100.0),
        ),
    ),
    "exponential": lambda service_ms, batch: (
        Fault(kind="slow", probability=0.02, delay=_delay("exponential", 5 * service_ms)),
    ),
    "pareto": lambda service_ms, batch: (
        Fault(kind="slow", probability=0.01, delay=_delay("pareto", 2 * service_ms)),
    ),
    "slower": lambda service_ms, batch: (Fault(kind="factor", worker=0, factor=3.0),),
    "bursts": lambda service_ms, batch: (
        Fault(
            kind="burst",
            factor=5.0,
            workers=3,
            every_s=service_ms / 5,
            delay=_delay("exponential", 20 * service_ms),
        ),
    ),
    "hung": lambda service_ms, batch: (Fault(kind="hang", worker=0, probability=0.001),),
}
"""Name -> model, by the mean service time in ms and the images of a request.

none: no worker straggles. held: one data task in a hundred is answered 100 ms late, at most one of
a request, which for requests of ten is the paper's model (Dinh & Lee, section 4.3). exponential:
2 % of the tasks block their worker for five service times in the mean. pareto: 1 % block it for at
least two, with a tail of exponent 1.5. slower: worker 0 is three times slower for good. bursts:
three workers at once, drawn again each time, compute five times slower for 20 service times in the
mean, every 200. hung: one task in a thousand of worker 0 never ends.
"""


class FaultsFile(Section):
    """A faults file of the service, or one with the simulator's stragglers."""

    seed: int = 0
    faults: tuple[Simulated, ...]


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
