"""What a running service has seen, as simulations read it from its answer of `GET /traffic`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import ConfigDict

from codedinvnet.config import Positive, Rate, Section, validated
from codedinvnet.errors import UserError
from codedinvnet.serving.traffic import OWN
from codedinvnet.serving.traffic_report import KIND, SCHEMA
from codedinvnet.simulation.distributions import Time


class SeenRules(Section):
    """The settings of a running service; see `Rules`."""

    model_config = ConfigDict(extra="ignore", frozen=True, allow_inf_nan=False)

    workers: int
    slots: Positive
    k: int
    group_timeout_ms: Rate
    hang_timeout_ms: Rate
    deadline_ms: Rate
    max_pending: Positive
    hedge_share: float
    extra: float | None
    worker_batch: int = 1
    backups: int = 0
    """Workers that compute a small backup's tasks alone; `workers` are the others."""
    upstream_hang_timeout_ms: Rate | None = None
    """None: it is no gateway."""


class Right(Section):
    """How often answers are right."""

    by: str
    """What they are compared with."""
    normal: float
    made_up: dict[int, float]


class Recorded(Section):
    """The answer of `GET /traffic`."""

    model_config = ConfigDict(extra="ignore", frozen=True, allow_inf_nan=False)

    model: str
    policy: str
    method: str | None
    offered: tuple[str, ...]
    refused: dict[str, str]
    since_s: float
    """When the policy was changed last, since the first request that is told."""
    seconds: float
    rules: SeenRules
    code: dict[str, Any] | None
    encode_share: Time | None = None
    """None: it is not known, as of a gateway or of another code than a bundle's own."""
    right: Right | None
    requests: tuple[tuple[float, int, float | None, float, int], ...]
    """When it came, its queries, how long it took, what of it the front end did, answers made up;
    times in ms."""
    unserved: tuple[tuple[float, str], ...] = ()
    """When a request came that was refused or cancelled, in ms, and which of these it was."""
    tasks: tuple[tuple[float, int, int, Time, Time], ...]
    """When it began, its worker, members (0: a data task), occupied and held; times in ms."""
    earlier: tuple[tuple[float, int, int, Time, Time], ...] = ()
    """The newest data tasks of workers that have few among `tasks`: they are older than these."""
    losses: tuple[tuple[float, int, str, float], ...]
    """When it was lost, the worker, why, and until another was up; times in ms."""

    def after(self, seconds: float) -> Recorded:
        """Return what was seen later than that, and each worker's newest OWN data tasks."""
        late = 1000 * seconds
        kept = {
            name: tuple(row for row in getattr(self, name) if row[0] >= late)
            for name in ("requests", "unserved", "tasks", "losses")
        }
        own: dict[int, list[Any]] = {}
        for row in sorted([*self.earlier, *(row for row in self.tasks if not row[2])]):
            own.setdefault(row[1], []).append(row)
        newest = (row for rows in own.values() for row in rows[-OWN:])
        kept["earlier"] = tuple(row for row in newest if row[0] < late)
        return self.model_copy(update=kept)


def read_traffic(raw: Any, where: object) -> Recorded:
    """Return what a service has seen.

    Args:
        raw: its answer of `GET /traffic`.
        where: the origin of that, for messages.

    Raises:
        UserError: if it is no such answer, or one of another release.
    """
    told = (raw.get("kind"), raw.get("schema_version")) if isinstance(raw, Mapping) else None
    if told != (KIND, SCHEMA):
        raise UserError(f"{where}: this is no answer of GET /traffic, or one of another release")
    return validated(Recorded, raw, f"{where}: GET /traffic")


def check_rules(what: str, rules: SeenRules) -> None:
    """Refuse the traffic of a service whose tasks a scenario cannot repeat.

    Args:
        what: would be made of the traffic, for the message.
        rules: the service's.

    Raises:
        UserError: if one call computes several queries, or a small backup has workers.
    """
    if rules.worker_batch > 1:
        raise UserError(f"no {what} with --worker-batch {rules.worker_batch}: it knows no calls")
    if rules.backups:
        raise UserError(f"no {what} where a small backup has workers of its own: none is simulated")
