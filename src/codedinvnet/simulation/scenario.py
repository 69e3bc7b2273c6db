"""What is simulated: load, workers, rules, times, stragglers; read from JSON."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Annotated, Any

from pydantic import Field, ValidationInfo, field_validator, model_validator

from codedinvnet.codes.registry import OURS, find_method
from codedinvnet.codes.rules import CodeRules, Parities, Uncoded, is_systematic
from codedinvnet.common.config import Positive, Section, validated
from codedinvnet.common.distributions import Distribution
from codedinvnet.common.errors import UserError
from codedinvnet.common.faults import Simulated
from codedinvnet.models.bundle import bundle_info
from codedinvnet.scheduler.policies import POLICIES, Policy
from codedinvnet.scheduler.settings import (
    FIRST_COPIES,
    MAX_BATCH,
    Rules,
    coded_too_late,
    hang_limit,
    pending_limit,
)
from codedinvnet.simulation.arrivals import Arrivals

Share = Annotated[float, Field(ge=0, le=1)]


class Scenario(Section):
    """One simulation. Times of the rules are in ms, as on `serve`'s command line.

    A task takes trip + service times its cost on its worker, and what stragglers add. One of m
    images that a network encodes takes m times encode as well. A request's latency is that of its
    last answer, plus `front_end`.
    """

    name: str = "scenario"
    seed: Annotated[int, Field(ge=0, lt=2**31)] = 0
    queries: Annotated[int, Field(gt=0, le=10**9)] = 100_000
    warmup: Annotated[float, Field(ge=0, lt=0.9)] = 0.05
    """The share of the requests, from the first, that is not counted."""
    arrivals: Arrivals
    workers: Annotated[int, Field(gt=0, le=10**6)] = 11
    policy: str = "coded"
    method: str = OURS
    """What makes up for missing answers, where the policy has a code: its tasks and their costs."""
    k: Positive = 10
    r: Positive = 1
    """How many missing answers of a group it makes up for, where that can be chosen."""
    slots: Positive | None = 1
    """How many tasks a worker is at, at most; None, with `cores`: found, as the gateway does."""
    cores: Positive | None = None
    """Makes workers servers behind the gateway: each computes so many requests at once and queues
    further ones, and has nothing to do with their trip. None: workers of `serve`."""
    gateways: Positive = 1
    """How many share the servers; a request comes to any of them."""
    message_ms: Annotated[float, Field(ge=0, lt=math.inf)] | None = None
    """A message's way from a gateway to the scheduler that the first of them runs for all, or back;
    None: each has a scheduler of its own, which knows its own requests only."""
    long_share: Share = 0.0
    """The share of the queries that take `long` times as long by themselves, on any worker."""
    long: Annotated[float, Field(ge=1)] = 10.0
    worker_batch: Positive = 1
    """How many data tasks a worker computes in one call, at most, as the setting of `serve`."""
    batch_fixed: Share = 0.0
    """The share of a data task's computing that a call costs once, however many tasks it has."""
    extra: Annotated[float, Field(ge=0)] | None = None
    """Extra work per query, at most, as the setting of `serve`; None: what suits the policy."""
    deadline_ms: Annotated[float, Field(gt=0)] = 5000.0
    group_timeout_ms: Annotated[float, Field(gt=0)] = 20.0
    hang_timeout_ms: Annotated[float, Field(gt=0)] | None = None
    """None: what suits the deadline (`hang_limit`), as of `serve`."""
    max_pending: Positive | None = None
    """None: what suits the workers (`pending_limit`), as of `serve`."""
    service: Distribution
    """Computing a data task; a parity task's embedding, too."""
    encode: Distribution = Distribution()
    """Encoding a parity query, for each image of its group, of a method that `encodes`. What
    `plan` measures is that of the bundle's E, whatever the method."""
    trip: Distribution = Distribution()
    """A task's way to its worker and back, during which the worker does nothing else."""
    front_end: Distribution = Distribution()
    """What a request costs in addition: protocol and heads."""
    decode: Distribution = Distribution()
    """Decoding."""
    restart: Distribution = Distribution(ms=300.0)
    """From a worker's loss until another is in its place."""
    stragglers: tuple[Simulated, ...] = ()
    bundle: str | None = None
    """Whose code it is."""

    @field_validator("policy", "method")
    @classmethod
    def _exists(cls, value: str, info: ValidationInfo) -> str:
        if info.field_name == "policy" and value not in POLICIES:
            raise ValueError(f"not one of {', '.join(POLICIES)}")
        try:
            find_method(value if info.field_name == "method" else OURS)
        except UserError as error:
            raise ValueError(str(error)) from error
        return value

    @model_validator(mode="after")
    def _fits(self) -> Scenario:
        coded = POLICIES[self.policy].takes_code
        if coded and self.k < 2:
            raise ValueError(f"policy {self.policy} needs k of at least 2")
        code = find_method(self.method).rules(self.k, self.r) if coded else None
        if self.method != OURS and code is None:
            raise ValueError(f"{self.method} goes with the policies that have a code")
        if (
            code is not None
            and not find_method(self.method).any_stragglers
            and code.r not in (0, self.r)
        ):
            raise ValueError(f"{self.method} has r = {code.r}")
        mixes = code is not None and not is_systematic(code)
        if mixes and self.policy != "coded":
            raise ValueError(f"{self.method} has no direct answers: it goes with policy coded only")
        needed = POLICIES[self.policy].fewest_workers(code or Uncoded())
        if self.workers < needed:
            what = f"with k = {self.k} and r = {self.r} " if coded else ""
            raise ValueError(
                f"{self.workers} workers are too few: policy {self.policy} {what}needs {needed}"
            )
        batch, most = self.arrivals.batch, min(MAX_BATCH, self.rules.max_pending)
        if batch > most:
            raise ValueError(f"requests of {batch} images could never be taken: {most} at most")
        for straggler in self.stragglers:
            named = (straggler.worker or 0) + 1
            if max(named, straggler.workers or 0) > self.workers:
                raise ValueError(f"a straggler names more than the {self.workers} workers")
            if mixes and straggler.per_request:
                raise ValueError(
                    f"a straggler hits a data task of a request (per_request); {self.method} has "
                    "none: each of its tasks is a mixture of the whole group"
                )
        if not 0 < self.service.mean_ms < math.inf:
            raise ValueError("service must take some time, and a finite one in the mean")
        if self.worker_batch > 1 and (self.slots != 1 or self.cores):
            raise ValueError("worker_batch goes with one slot of workers without cores")
        if self.slots is None and not self.cores:
            raise ValueError("slots are found only of servers with cores")
        if self.cores and (coded or any(s.kind in ("crash", "hang") for s in self.stragglers)):
            raise ValueError("servers with cores have no codes, and neither crash nor hang")
        if self.gateways > 1 and not self.cores:
            raise ValueError("several gateways share servers with cores only")
        if self.long_share and (coded or self.worker_batch > 1):
            raise ValueError("long_share goes with policies that have no code, and single tasks")
        if coded and (why := coded_too_late(self.group_timeout_ms, self.deadline_ms)):
            raise ValueError(f"group_timeout_ms {why}")
        for name in ("trip", "encode", "front_end", "decode"):
            if not math.isfinite(getattr(self, name).mean_ms):
                raise ValueError(f"{name} must take a finite time in the mean")
        return self

    @property
    def rules(self) -> Rules:
        """The service's rules, as `codedinvnet serve` makes them of its options."""
        gateway = {"head_start": FIRST_COPIES} if self.cores else {}
        return Rules(
            workers=self.workers,
            policy=POLICIES[self.policy],
            group_timeout=self.group_timeout_ms / 1000,
            hang_timeout=math.inf if self.cores else self.hang_ms / 1000,
            hedge_share=1 / self.k,
            extra=self.extra,
            max_pending=self.max_pending or pending_limit(self.workers),
            slots=self.slots,
            worker_batch=self.worker_batch,
            **gateway,  # type: ignore[arg-type]
        )

    @property
    def at_once(self) -> int:
        """How many tasks a worker computes at the same time."""
        return self.cores or self.slots or 1

    @property
    def mean_ms(self) -> float:
        """Computing a data task, in the mean of long queries and others."""
        return self.service.mean_ms * (1 + self.long_share * (self.long - 1))

    def call_cost(self, tasks: int) -> float:
        """Return what a call of so many data tasks computes, in services."""
        return self.batch_fixed + (1.0 - self.batch_fixed) * tasks

    @property
    def requests(self) -> int:
        """How many there are in a run."""
        return math.ceil(self.queries / self.arrivals.batch)

    @property
    def counted(self) -> int:
        """How many of these count: those after the warm-up."""
        return self.requests - int(self.warmup * self.requests)

    @property
    def hang_ms(self) -> float:
        """How long a worker may be at one task before it is replaced."""
        own = self.hang_timeout_ms
        return hang_limit(self.deadline_ms) if own is None else own

    @property
    def coding(self) -> Policy:
        """The policy."""
        return POLICIES[self.policy]

    @property
    def code(self) -> CodeRules | None:
        """The rules of the code, as the service has them; None for a policy without one."""
        if not self.coding.takes_code:
            return None
        bundle = None if self.bundle is None else bundle_info(self.bundle)
        code = find_method(self.method).rules(self.k, self.r, bundle)
        if isinstance(code, Parities):  # guesses at the deadline are too few to matter
            code = replace(code, guesses=False)
        return code

    @property
    def capacity_qps(self) -> float:
        """Images a second at which data tasks, each a call, would keep all workers busy."""
        busy_ms = self.mean_ms + (0.0 if self.cores else self.trip.mean_ms)
        return 1000 * self.workers * self.at_once / busy_ms

    @property
    def busy_workers(self) -> float:
        """How many workers data tasks alone keep busy in the mean, in calls as large as can be.

        A worker is busy that has a task in each of its slots. Of stragglers those count that hit
        every worker and do not end; a service with fewer workers cannot keep up, however it makes
        up for late answers.
        """
        computing, blocked = self.mean_ms, 0.0
        for straggler in self.stragglers:
            if straggler.worker is not None or straggler.until_s is not None:
                continue
            share = straggler.probability
            share /= self.arrivals.batch if straggler.per_request else 1
            if straggler.kind == "factor" and straggler.factor is not None:
                computing *= 1 + share * (straggler.factor - 1)
            elif straggler.kind == "slow" and straggler.delay is not None:
                blocked += share * straggler.delay.mean_within(self.hang_ms)
            elif straggler.kind == "hang":
                blocked += share * self.hang_ms
        size = self.worker_batch
        call = computing * self.call_cost(size) + blocked
        call += 0.0 if self.cores else self.trip.mean_ms
        return self.arrivals.qps * call / size / self.at_once / 1000

    def updated(self, **changes: Any) -> Scenario:
        """Return a validated copy with some values changed, those of `arrivals` included.

        Raises:
            UserError: if they do not fit.
        """
        raw = self.model_dump()
        for key in ("qps", "batch", "kind"):
            if key in changes:
                raw["arrivals"][key] = changes.pop(key)
        return parse_scenario({**raw, **changes}, self.name)


def parse_scenario(raw: Any, where: str) -> Scenario:
    """Validate a scenario; `where` names its origin in errors.

    Raises:
        UserError: one line that says what is wrong.
    """
    return validated(Scenario, raw, where)
