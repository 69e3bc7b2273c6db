"""What `GET /traffic` says: the traffic that was seen, under which rules, and what is known."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from codedinvnet.codes.rules import as_json
from codedinvnet.serving.traffic import SeenTask

if TYPE_CHECKING:  # a simulation does without what computes
    from codedinvnet.serving.frontend import FrontEnd

KIND, SCHEMA = "traffic", 2


@dataclass(frozen=True)
class Known:
    """What is known of a model before anything is measured.

    Attributes:
        encode_share: what encoding an extra task takes for each member, in service times; None if
            it is not known.
        normal: the share of direct answers that are right; None if it is not known.
        made_up: size of the group -> the share of answers made up in it that are right.
        hang_timeout: seconds after which a gateway may ask another upstream; None: it is no
            gateway. No worker is replaced for that.
    """

    encode_share: float | None = None
    normal: float | None = None
    made_up: Mapping[int, float] = field(default_factory=dict)
    hang_timeout: float | None = None


def told(front: FrontEnd, known: Known) -> dict[str, Any]:
    """Return what `GET /traffic` says. May be called in a thread while the service goes on.

    What workers did that are gone is left out: nobody does it any more.
    """
    scheduler, rules, traffic = front.scheduler, front.rules, front.times.traffic
    requests, here = traffic.gapless(), front.supervisor.is_here
    unserved = tuple(traffic.unserved)
    start = min((r.at for r in requests), default=traffic.since)
    code, mains = scheduler.offered, rules.workers - rules.backups
    hang = known.hang_timeout
    return {
        "schema_version": SCHEMA,
        "kind": KIND,
        "model": front.served.name,
        **front.choices.told(scheduler.chosen),
        "since_s": round(traffic.since - start, 3),
        "seconds": round(time.monotonic() - start, 3),
        "rules": {
            "workers": sum(worker < mains for worker in tuple(scheduler.binding.up)),
            "backups": rules.backups,
            "slots": rules.slots,
            "k": 1 if code is None else code.k,
            "group_timeout_ms": 1000 * rules.group_timeout,
            "hang_timeout_ms": 1000 * rules.hang_timeout,
            "upstream_hang_timeout_ms": hang and 1000 * hang,
            "deadline_ms": 1000 * front.deadline,
            "max_pending": rules.max_pending,
            "hedge_share": rules.hedge_share,
            "extra": rules.extra,
            "worker_batch": rules.worker_batch,
        },
        "code": None if code is None else as_json(code),
        "encode_share": known.encode_share,
        "right": _right(front, known),
        "requests": [
            [
                round(1000 * (r.at - start), 2),
                r.queries,
                None if r.seconds is None else round(1000 * r.seconds, 2),
                round(1000 * r.besides, 3),
                r.made_up,
            ]
            for r in requests
        ],
        "unserved": [
            [round(1000 * (lost.at - start), 2), lost.why] for lost in unserved if lost.at >= start
        ],
        "tasks": [_row(task, start) for task in tuple(traffic.tasks) if here(task.worker, task.at)],
        "earlier": [_row(task, start) for task in traffic.earlier() if here(task.worker, task.at)],
        "losses": [
            [round(1000 * (x.at - start), 2), x.worker, x.kind, round(1000 * x.seconds, 1)]
            for x in tuple(front.supervisor.losses)
            if here(x.worker, x.at)
        ],
    }


def _row(task: SeenTask, start: float) -> list[float]:
    times = (task.at - start, task.occupied, task.held)
    at, occupied, held = (round(1000 * seconds, 3) for seconds in times)
    return [at, task.worker, task.members, occupied, held]


def _right(front: FrontEnd, known: Known) -> dict[str, Any] | None:
    """Return how often answers are right: by labels, else as the service's own checks have it."""
    if known.normal is not None and known.made_up:
        made_up = {str(size): share for size, share in known.made_up.items()}
        return {"by": "labels", "normal": known.normal, "made_up": made_up}
    agreement = front.metrics.live_agreement()
    if agreement is None:
        return None
    return {"by": "direct answers", "normal": 1.0, "made_up": {str(front.choices.size): agreement}}
