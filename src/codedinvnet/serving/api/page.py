"""What the page of a service shows, and what its buttons do."""

from __future__ import annotations

import base64
import contextlib
import os
import re
import signal
import time
from collections.abc import Mapping, Sequence
from importlib import resources
from typing import Any

import numpy as np

from codedinvnet.common.distributions import Distribution
from codedinvnet.common.faults import Fault
from codedinvnet.net.answers import Reply
from codedinvnet.net.logs import log_event
from codedinvnet.net.protocol.tensors import datatype_of, to_json
from codedinvnet.net.requests import Request
from codedinvnet.serving.api.errors import HttpError
from codedinvnet.serving.api.http import Routes, json_reply
from codedinvnet.serving.dispatch import Dispatcher
from codedinvnet.serving.metrics import OUTCOMES
from codedinvnet.serving.served import IMAGES, Served
from codedinvnet.serving.service import InferenceService
from codedinvnet.serving.workers.faults import FaultyPool
from codedinvnet.serving.workers.pool import zeros
from codedinvnet.serving.workers.supervisor import State

NO_FRAMES = (
    (b"X-Frame-Options", b" DENY"),
    (b"Content-Security-Policy", b" frame-ancestors 'none'"),
)
"""Another site's page shows this one in no frame, where clicks could be led to it."""
SLOW_MS = 300.0
"""How much the page's button slows a worker."""
SILENT_AFTER = 0.3
"""Seconds on one task after which the page calls a worker silent."""
LATELY = 5.0
"""Seconds that a point of the page's chart is of."""
DEMO_HEADER = "X-Codedinvnet-Demo"
"""The header of requests that hurt workers: pages of other sites cannot send it."""


def page_state(service: InferenceService, *, demo: bool) -> dict[str, Any]:
    """Return what the page shows."""
    dispatcher, served = service.dispatcher, service.served
    scheduler, now = dispatcher.scheduler, time.monotonic()
    decision, recent = scheduler.dispatcher.decision, dispatcher.metrics.recent
    busy_since = [worker.busy_since for worker in scheduler.assigner.workers]
    return {
        "model": served.name,
        "policy": scheduler.chosen.name,
        "k": scheduler.dispatcher.code.k,
        "demo": demo,
        "throughput": round(recent.throughput(), 1),
        "percentiles": recent.percentiles(),
        "answers": {
            outcome: int(dispatcher.metrics.queries.labels(outcome)._value.get())
            for outcome in OUTCOMES
        },
        "lately": recent.summary(LATELY, scheduler.stats.normal),
        "decision": None if decision is None else decision.summary,
        "agreement": dispatcher.metrics.live_agreement(),
        "releasing": None if dispatcher.gate is None else dispatcher.gate.releasing,
        "workers": [
            {
                "state": "silent" if silent(busy_since[i], now) else worker.state.value,
                "queue": scheduler.load(i),
                "tasks": worker.tasks,
                "restarts": worker.restarts,
                "pid": None if worker.state is State.STARTING else dispatcher.pool.pid(i),
            }
            for i, worker in enumerate(dispatcher.supervisor.workers)
        ],
    }


def silent(busy_since: float | None, now: float) -> bool:
    """Return whether a worker has been at one task for a suspiciously long time."""
    return busy_since is not None and now - busy_since > SILENT_AFTER


def demo_requests(served: Served, images: np.ndarray | None = None) -> list[dict[str, Any]]:
    """Return requests for the page to send: one for each image (N, C, H, W), or one of zeros.

    They are of the protocol, except that bytes are in base64.
    """
    if images is not None:
        batches = [{IMAGES: image[None]} for image in images]
    else:
        batches = [zeros(served.signature.inputs)]
    return [
        {
            "inputs": [
                {
                    "name": name,
                    "shape": list(array.shape),
                    "datatype": datatype_of(array),
                    "data": base64.b64encode(array.tobytes()).decode()
                    if array.dtype == np.uint8
                    else to_json(array),
                }
                for name, array in batch.items()
            ]
        }
        for batch in batches
    ]


def page_routes(service: InferenceService, requests: Sequence[Mapping[str, Any]] | None) -> Routes:
    """Return the page's routes; its buttons send the requests, without which it has none."""
    page = (resources.files(__package__) / "page.html").read_bytes()
    routes: Routes = {
        "/": {"GET": lambda *_: Reply(200, page, "text/html; charset=utf-8", NO_FRAMES)},
        "/page/state": {
            "GET": lambda *_: json_reply(page_state(service, demo=requests is not None))
        },
    }
    return routes if requests is None else {**routes, **demo_routes(service.dispatcher, requests)}


def demo_routes(dispatcher: Dispatcher, requests: Sequence[Mapping[str, Any]]) -> Routes:
    """Return those of the buttons: slow, stop, kill and heal a worker, and requests to send."""
    pool = dispatcher.pool

    def do(request: Request, path: re.Match[str]) -> Reply:
        name, deed = path.groups()
        if request.head.known.get(DEMO_HEADER.lower().encode()) != b"1":
            raise HttpError(403, f"the header {DEMO_HEADER}: 1 is needed")
        if name not in map(str, range(dispatcher.rules.workers)) or not isinstance(
            pool, FaultyPool
        ):
            raise HttpError(404, f"no worker {name}")
        worker = int(name)
        if dispatcher.supervisor.workers[worker].state is State.STARTING:
            raise HttpError(503, f"worker {worker} is starting")
        pid = pool.pid(worker)
        signals = {"kill": signal.SIGKILL, "stop": signal.SIGSTOP, "heal": signal.SIGCONT}
        if deed not in (*signals, "slow"):
            raise HttpError(404, f"no deed {deed!r}: slow, stop, kill or heal")
        if pid is None and deed in ("kill", "stop"):
            up = dispatcher.supervisor.workers[worker].state is State.UP
            why = "runs on another machine: slow it instead" if up else "is being replaced"
            raise HttpError(409, f"worker {worker} {why}")
        if deed in ("slow", "heal"):
            pool.clear(worker)
        if deed == "slow":
            pool.add(Fault(kind="slow", worker=worker, delay=Distribution(ms=SLOW_MS)))
        elif pid is not None:
            with contextlib.suppress(ProcessLookupError):  # it has just ended
                os.kill(pid, signals[deed])
        log_event("demo", worker=worker, deed=deed)
        return json_reply({"worker": worker, "deed": deed})

    return {
        "/demo/requests": {"GET": lambda *_: json_reply(requests)},
        "/demo/workers/([^/]+)/([^/]+)": {"POST": do},
    }
