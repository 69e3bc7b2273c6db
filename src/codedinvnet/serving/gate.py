"""Which approximate answers are released, and which workers answer wrongly."""

from __future__ import annotations

import logging
import math
from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING, TypeAlias

import numpy as np

from codedinvnet.codes.rules import CodeRules, is_systematic
from codedinvnet.common.errors import UserError
from codedinvnet.net.logs import log_event
from codedinvnet.protection.bound import Curve
from codedinvnet.protection.calibration import DECODED, GUESSED, Calibration
from codedinvnet.scheduler.policies import Policy
from codedinvnet.serving.byzantine import ByzantineDetector, Member
from codedinvnet.serving.decoding import Check, Facts, Found
from codedinvnet.serving.metrics import Metrics
from codedinvnet.serving.queries import InFlightQuery
from codedinvnet.serving.watch import Watch

if TYPE_CHECKING:
    from codedinvnet.codes.base import Scheme

REPLACE, REPORT = "replace", "report"
"""What is done about a worker that answers wrongly."""
LATELY = 100
"""Answers of each worker whose requests are logged when it is found to answer wrongly."""
HALVINGS = 4
"""A request's own limit is the service's, halved so often at most."""

Thresholds: TypeAlias = "dict[tuple[float | None, int, str], float]"


class AnswerGate:
    """Releases answers by a calibration; watches answers and workers by complete groups.

    At most the share `limit` of released answers may disagree; without one all are released.
    """

    def __init__(
        self,
        calibration: Calibration,
        method: str,
        k: int,
        workers: int,
        limit: float | None = None,
        on_corruption: str = REPORT,
    ) -> None:
        self.limit, self.replaces = limit, on_corruption == REPLACE
        self.curves = {
            (size, answer): calibration.curve(method, size, answer)
            for size in range(1, k + 1)
            for answer in (DECODED, GUESSED)
        }
        self.limits: list[float] = (
            [] if limit is None else [limit / 2**n for n in range(HALVINGS + 1)]
        )
        self.thresholds = self._least(Curve.threshold)
        self.strict_thresholds = self._least(Curve.strict_threshold)
        self.watch = None if limit is None else Watch(limit)
        self.liars = ByzantineDetector(workers)
        self.lately: list[deque[str]] = [deque(maxlen=LATELY) for _ in range(workers)]

    def _least(self, of: Callable[[Curve, float], float]) -> Thresholds:
        """Return the least confidences of released answers by limit, group size and outcome."""
        found = {
            (kept, id(curve)): math.inf if curve is None else of(curve, kept)
            for curve in {id(curve): curve for curve in self.curves.values()}.values()
            for kept in self.limits
        }
        return {
            (kept, *kind): found[kept, id(curve)]
            for kind, curve in self.curves.items()
            for kept in self.limits
        }

    def begin(self, metrics: Metrics, wrong: Callable[[int], None]) -> None:
        """Begin to count; `wrong` is called with a worker that is to be replaced."""
        self.metrics, self.wrong = metrics, wrong
        metrics.releasing.set(1)

    def kept(self, asked: float | None) -> float | None:
        """Return the limit that stands for a request: its own, or the service's if that is lower.

        A lower one is rounded down to the service's, halved some times; the lowest of these
        stands for whatever is below it.
        """
        if self.limit is None or asked is None:
            return self.limit
        lower = [limit for limit in self.limits if limit <= asked]
        return lower[0] if lower else self.limits[-1]

    @property
    def releasing(self) -> bool | None:
        """Whether traffic lets answers be released; None if no limit is kept."""
        return None if self.watch is None else self.watch.releasing

    def releases(self, found: Found, size: int, query: InFlightQuery | None) -> bool:
        """Return whether an approximate answer is released; note how likely it is to agree."""
        if query is None or query.outcome not in (DECODED, GUESSED):
            return True  # a direct answer may have come meanwhile
        query.agreement = self.agreement(found, size, query.outcome)
        if self.watch is None:
            return True
        threshold = self._threshold(self.kept(query.limit), size, query.outcome)
        released = self.watch.releasing and found.confidence >= threshold
        self.metrics.withheld.inc(not released)
        return released

    def _threshold(self, limit: float | None, size: int, outcome: str) -> float:
        """Return the least confidence of released answers, stricter while the watch says so."""
        kind = limit, size, outcome
        is_strict = self.watch is not None and self.watch.strict
        return self.strict_thresholds[kind] if is_strict else self.thresholds[kind]

    def agreement(self, found: Found, size: int, outcome: str) -> float | None:
        """Return the calibrated probability that an approximate answer agrees; None without one."""
        curve = self.curves[size, outcome]
        if curve is None:
            return None
        return float(curve.probability(np.array([found.confidence]))[0])

    def compared(self, check: Check, facts: Facts) -> None:
        """Take what a complete group says."""
        curve = self.curves.get((check.size, GUESSED))
        if self.watch is not None and curve is not None and facts.guessed:
            wrong = sum(not agrees for _, _, agrees in facts.guessed)
            self.watch.guessed(wrong, len(facts.guessed) * curve.disagreement)
            self.metrics.drifting.set(bool(self.watch.drifting))
        if self.watch is not None and facts.decoded is not None:
            self._watch(self.watch, check.size, *facts.decoded)
        self._test(check, facts)

    def _watch(self, watch: Watch, size: int, confidence: float, agrees: bool) -> None:
        reached = confidence >= self.thresholds[watch.limit, size, DECODED]
        sure = confidence >= self.strict_thresholds[watch.limit, size, DECODED]
        if sure if watch.strict else reached:
            self.metrics.released_checks.inc()
            self.metrics.released_disagreements.inc(not agrees)
        if watch.compared(reached, agrees, sure):
            self.metrics.releasing.set(watch.releasing)
            event = "approximate answers are released again"
            if not watch.releasing:
                event = "approximate answers are no longer released"
            level = logging.INFO if watch.releasing else logging.WARNING
            log_event(event, level, limit=watch.limit, comparisons=watch.comparisons)

    def _test(self, check: Check, facts: Facts) -> None:
        curve = self.curves.get((check.size, GUESSED))
        extra = [worker for task, worker in check.workers.items() if task >= check.size]
        if curve is None or len(extra) != 1 or not facts.guessed:
            return
        rates = 1 - curve.probability(np.array([confidence for _, confidence, _ in facts.guessed]))
        members = [
            Member(check.workers[i], float(expected), agrees)
            for (i, _, agrees), expected in zip(facts.guessed, rates, strict=True)
        ]
        worker = self.liars.seen(members, extra[0])
        if worker is None:
            return
        self.metrics.wrong_workers.labels(str(worker)).inc()
        requests = list(dict.fromkeys(self.lately[worker]))
        log_event("worker answers wrongly", logging.ERROR, worker=worker, requests=requests)
        self.lately[worker].clear()
        if self.replaces:
            self.wrong(worker)

    def answered(self, worker: int, query: InFlightQuery) -> None:
        """Note whose direct answer a query gets."""
        if query.request is not None:
            self.lately[worker].append(query.request)


def unnoticed(scheme: Scheme | None, policy: Policy, gate: AnswerGate | None) -> str:
    """Return why workers that answer wrongly are not noticed; "" if they are."""
    if scheme is None or not policy.takes_code:
        return f"the policy {policy.name} computes nothing that answers are compared with"
    k = scheme.rules.k
    if gate is None or gate.curves[k, GUESSED] is None:
        return f"no calibration says what {scheme.name}'s extra task answers by itself at k = {k}"
    if len(scheme.rules.tasks(k)) != k + 1:
        return f"groups of {scheme.name} have several extra tasks, and one is compared with"
    if len(gate.lately) < 2:
        return "one worker cannot be compared with another"
    return ""


def gate_of(
    calibration: Calibration | None,
    method: str,
    rules: CodeRules,
    workers: int,
    limit: float | None,
    whose: str,
    on_corruption: str = REPORT,
) -> AnswerGate | None:
    """Return a service's answer gate; None without a calibration for the method.

    `whose` says what should have the calibration.

    Raises:
        UserError: if a limit on disagreement could not be kept.
    """
    k = rules.k
    if limit is not None and not is_systematic(rules):
        raise UserError(
            f"--max-disagreement: {method} has no direct answers, so that nothing stands in for "
            "what is withheld, and nothing is compared: give no limit, or another --method"
        )
    if calibration is not None and (curve := calibration.curve(method, k)) is not None:
        if limit is not None and math.isinf(curve.threshold(limit)):
            event = "no approximate answer keeps the limit"
            reason = "too few inputs calibrated it, or too many answers disagree"
            log_event(event, logging.WARNING, method=method, max_disagreement=limit, reason=reason)
        return AnswerGate(calibration, method, k, workers, limit, on_corruption)
    if limit is not None:
        raise UserError(f"--max-disagreement: {whose} is not calibrated for {method} with k = {k}")
    return None
