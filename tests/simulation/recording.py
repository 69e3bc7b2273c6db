"""What a service would say of a simulated run at `GET /traffic`."""

from __future__ import annotations

from typing import Any

from codedinvnet.codes.rules import as_json
from codedinvnet.scheduler.actions import Replace, Send
from codedinvnet.serving.traffic_report import KIND, SCHEMA
from codedinvnet.simulation.engine import Simulation
from codedinvnet.simulation.scenario import Scenario

OFFERED = ("uncoded", "replicate", "hedge", "coded", "coded+hedge")


class Recording(Simulation):
    """A simulation that takes down its tasks and losses, in ms."""

    def __init__(self, scenario: Scenario) -> None:
        super().__init__(scenario)
        self.tasks: list[tuple[float, int, int, float, float]] = []
        self.losses: list[tuple[float, int, str, float]] = []
        self._members: dict[int, int] = {}
        self._gone: dict[int, tuple[float, str]] = {}

    def _send(self, action: Send) -> None:
        extra = action.task >= self.scheduler.code.k
        self._members[action.attempt] = len(action.members) if extra else 0
        super()._send(action)

    def _done(self, worker: int, life: int, attempts: tuple[int, ...], held: float) -> None:
        if life == self._lives[worker]:
            (attempt,) = attempts
            began, now = self._began[worker][attempt], self.clock.now
            took = 1000 * (now - began)
            row = (1000 * began, worker, self._members[attempt], took, 1000 * held)
            self.tasks.append(row)
        super()._done(worker, life, attempts, held)

    def _replace(self, action: Replace) -> None:
        kind = "hung" if action.reason == "hung" else "died"
        self._gone[action.worker] = (1000 * self.clock.now, kind)
        super()._replace(action)

    def _up(self, worker: int) -> None:
        at, kind = self._gone.pop(worker)
        self.losses.append((at, worker, kind, 1000 * self.clock.now - at))
        super()._up(worker)


def traffic(scenario: Scenario, **changes: Any) -> dict[str, Any]:
    """Return what is seen of a run of a scenario."""
    run = Recording(scenario)
    records = run.run()
    rules, code = scenario.rules, scenario.updated(policy="coded").code
    assert code is not None
    latency = (1000 * records.latency).tolist()
    return {
        "schema_version": SCHEMA,
        "kind": KIND,
        "model": "mnist",
        "policy": scenario.policy,
        "method": scenario.method,
        "offered": OFFERED,
        "refused": {},
        "since_s": 0.0,
        "seconds": records.seconds,
        "rules": {
            "workers": rules.workers,
            "slots": rules.slots,
            "k": scenario.k,
            "group_timeout_ms": scenario.group_timeout_ms,
            "hang_timeout_ms": scenario.hang_ms,
            "deadline_ms": scenario.deadline_ms,
            "max_pending": rules.max_pending,
            "hedge_share": rules.hedge_share,
            "extra": rules.extra,
        },
        "code": as_json(code),
        "encode_share": scenario.encode.mean_ms / scenario.service.mean_ms,
        "right": {"by": "labels", "normal": 0.99, "made_up": {str(scenario.k): 0.9}},
        "requests": [
            (1000 * at, size, None if late == float("inf") else late, 0.0, int(made))
            for at, size, late, made in zip(
                run._arrivals, run._sizes, latency, records.decoded, strict=True
            )
        ],
        "tasks": run.tasks,
        "losses": run.losses,
        **changes,
    }
