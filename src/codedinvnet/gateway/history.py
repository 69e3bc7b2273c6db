"""The last quarter of an hour in steps: requests, errors, and how long requests waited."""

from __future__ import annotations

import time
from collections import Counter, deque
from typing import Any

from codedinvnet.gateway.metrics import STEP, milliseconds, quantiles_of
from codedinvnet.gateway.proof import Arm, Batch, by_arm, without_copies

STEPS, WINDOW = 90, 30
"""That are kept, and that the quantiles without copies are of."""
FAILED = frozenset({"failed", "aborted"})
"""Outcomes that are errors whatever the status; 5xx always is one. The alerts count likewise."""


class Step(Batch):
    """Requests of a few seconds.

    Args:
        number: of the step, since the gateway was started.
        began: when it did.
    """

    __slots__ = ("errors", "number", "requests")

    def __init__(self, number: int, began: float) -> None:
        super().__init__(began)
        self.number, self.requests = number, 0
        self.errors: dict[tuple[str, str, int], int] = {}
        """By route, outcome and status."""


class History:
    """Counts requests of a gateway, or of a route, by steps of `STEP` seconds."""

    def __init__(self) -> None:
        self._began = self._until = time.monotonic()
        self._steps: deque[Step] = deque(maxlen=STEPS + 1)
        """Those with requests."""
        self._drawn: tuple[int, dict[str, Any]] = (-1, {})

    def waited(self, now: float, seconds: float, arm: Arm) -> None:
        """Take in how long a request waited for its first content, or in vain."""
        self._step(now).add(seconds, arm)

    def ended(self, now: float, route: str, outcome: str, status: int) -> None:
        """Count how a request ended, and with which status; 0: none."""
        step = self._step(now)
        step.requests += 1
        if status >= 500 or outcome in FAILED:
            key = route, outcome, status
            step.errors[key] = step.errors.get(key, 0) + 1

    def _step(self, now: float) -> Step:
        if now >= self._until:
            number = self._number(now)
            began = self._began + number * STEP
            self._steps.append(Step(number, began))
            self._until = began + STEP
        return self._steps[-1]

    def _number(self, now: float) -> int:
        return int((now - self._began) // STEP)

    def errors(self) -> dict[str, Any]:
        """Return how many requests there were, and which errors, those of the current step too."""
        number = self._number(time.monotonic())
        kept = [step for step in self._steps if step.number >= number - STEPS]
        errors, last = Counter[tuple[str, str, int]](), dict[tuple[str, str, int], int]()
        for step in kept:
            errors.update(step.errors)
            last |= dict.fromkeys(step.errors, step.number)
        return {
            "requests": sum(step.requests for step in kept),
            "errors": [
                {
                    "route": route,
                    "outcome": outcome,
                    "status": status,
                    "count": count,
                    "seconds_ago": (number - last[route, outcome, status]) * STEP,
                }
                for (route, outcome, status), count in errors.most_common()
            ],
        }

    def drawn(self) -> dict[str, Any]:
        """Return what there is of each step, oldest first, except of the current one."""
        number = self._number(time.monotonic())
        if self._drawn[0] != number:
            self._drawn = number, self._made(number)
        return self._drawn[1]

    def _made(self, end: int) -> dict[str, Any]:
        found = {step.number: step for step in self._steps}
        steps = [found.get(n) or Step(n, 0.0) if n >= 0 else None for n in range(end - STEPS, end)]
        known = [step for step in steps if step is not None]
        unknown = [None] * (STEPS - len(known))
        quantiles = [quantiles_of(counts(step), 0.5, 0.99) for step in known]
        windows = [steps[n : n + WINDOW] for n in range(0, STEPS, WINDOW)]
        return {
            "step_seconds": STEP,
            "requests": [*unknown, *(step.requests for step in known)],
            "errors": [*unknown, *(sum(step.errors.values()) for step in known)],
            "p50_ms": [*unknown, *(milliseconds(p50) for p50, _ in quantiles)],
            "p99_ms": [*unknown, *(milliseconds(p99) for _, p99 in quantiles)],
            "window_steps": WINDOW,
            "without": [without([step for step in each if step]) for each in windows],
        }


def counts(step: Step) -> Counter[int]:
    """Return how many requests there are in each bucket of times."""
    found = Counter[int]()
    for times in step.times:
        found.update(times)
    return found


def without(steps: list[Step]) -> dict[str, Any] | None:
    """Return the quantiles as they would be without copies; None if no request is concerned."""
    with_requests = [step for step in steps if step.count()]
    if not any(by_arm(with_requests)[Arm.COPIED :]):
        return None
    return {
        name: {
            **{f"{end}_ms": milliseconds(s) for end, s in each._asdict().items()},
            "text": str(each),
        }
        for name, each in without_copies(with_requests).items()
    }
