"""The numbers that a service is started with."""

from __future__ import annotations

import math
from dataclasses import dataclass

from codedinvnet.scheduler.policies import Policy
from codedinvnet.scheduler.tuning import TUNING, Tuning

AUTO_EXTRA = 0.2
"""Extra work per query that `auto` may do by default: twice the tenth that a parity for each group
of ten is, so that copies of late queries are paid as well."""
SHORTEST_HANG, HANG_SHARE = 1000.0, 0.6
"""Milliseconds on one task after which a worker is taken for hung by default: a share of the
deadline, so that there is time to send its query again, and no less than these. The machine itself
may stand still for so long."""
FIRST_DELAY, FIRST_COPIES = 1.0, 20
"""For a gateway that has just started: the seconds until a fallback is asked before the times of a
route are known, and how many requests its budget of copies counts as already come. Twenty are what
it takes to know when a request is late; at a share of a tenth they pay for two copies."""
MAX_BATCH = 256
"""Images of one request, at most, by default: of 224 x 224 pixels they take 150 MB as floats."""


def pending_limit(workers: int) -> int:
    """Return how many queries may be unanswered before more are refused, by default."""
    return max(2000, 200 * workers)


def hang_limit(deadline_ms: float) -> float:
    """Return the ms that a worker may be at one task before it is replaced, by default."""
    return max(SHORTEST_HANG, HANG_SHARE * deadline_ms)


def copied_after(late: float | None, delay: tuple[float, float] | None) -> float | None:
    """Return the seconds after which a query is copied; None: it isn't yet.

    Args:
        late: as is measured; None before that is known.
        delay: the least and the most that its route allows; None: any.
    """
    least, most = delay or (0.0, math.inf)
    if late is None:
        return None if math.isinf(most) else most
    return min(max(late, least), most)


def coded_too_late(group_timeout_ms: float, deadline_ms: float) -> str:
    """Return why groups cannot wait so long for members; "" if they can."""
    if group_timeout_ms < deadline_ms:
        return ""
    return (
        f"must be below the deadline of {deadline_ms:g} ms, got {group_timeout_ms:g}: a group that "
        "does not fill would be coded too late"
    )


@dataclass(frozen=True)
class Rules:
    """What the scheduler goes by. Times are in seconds.

    Attributes:
        workers: how many there are.
        policy: see `policies.POLICIES`.
        group_timeout: how long an open group waits for members.
        hang_timeout: how long a worker may spend on one task before it is replaced.
        hedge_share: copies of late queries per query, at most, if `extra` does not say.
        first_delay: seconds until a fallback is asked before times are known; None: none is.
        hold_out: the share of the late queries to be copied that by lot are not: they show what
            happens without copies.
        head_start: how many queries have paid for copies before the first one comes.
        extra: extra work per query, at most, in service times: copies, parities and backups
            together. None: a policy's own copies and extra tasks, but for those of `hedge_share`,
            are all sent; `auto` has AUTO_EXTRA.
        max_pending: unanswered queries, at most.
        max_losses: a query whose attempts are lost so often fails.
        slots: how many tasks a worker may be at; None: found for each, see `concurrency`.
        fallbacks: the last so many workers are cheaper ones, which get late queries and nothing
            else.
        fallback_slots: how many tasks one of these may be at.
        worker_batch: how many data tasks a worker computes in one call, at most; more than 1 goes
            with one slot.
        tuning: numbers that no user sets.
    """

    workers: int
    policy: Policy
    group_timeout: float = 0.02
    hang_timeout: float = 3.0
    hedge_share: float = 0.1
    first_delay: float | None = None
    hold_out: float = 0.0
    head_start: int = 0
    extra: float | None = None
    max_pending: int = 1000
    max_losses: int = 5
    slots: int | None = 1
    fallbacks: int = 0
    fallback_slots: int = 1
    worker_batch: int = 1
    tuning: Tuning = TUNING

    @property
    def mains(self) -> int:
        """How many workers are no fallbacks; they come first."""
        return self.workers - self.fallbacks

    def extra_of(self, policy: Policy) -> float | None:
        """Return the extra work per query of a policy, at most; None if copies alone are bound."""
        return AUTO_EXTRA if self.extra is None and policy.adapts else self.extra
