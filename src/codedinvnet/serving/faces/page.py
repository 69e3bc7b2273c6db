"""What the page of a service shows, and what its buttons do."""

from __future__ import annotations

import base64
import contextlib
import os
import signal
import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from codedinvnet.serving.frontend import FrontEnd
from codedinvnet.serving.logs import log_event
from codedinvnet.serving.metrics import OUTCOMES
from codedinvnet.serving.outputs import zeros
from codedinvnet.serving.served import IMAGES, Served
from codedinvnet.serving.service import Service
from codedinvnet.serving.supervisor import STARTING
from codedinvnet.serving.tensors import datatype_of, to_json
from codedinvnet.serving.workers.faults import Delay, Fault, FaultyPool

SLOW_MS = 300.0
"""How much the page's button slows a worker."""
SILENT_AFTER = 0.3
"""Seconds on one task after which the page calls a worker silent."""
LATELY = 5.0
"""Seconds that a point of the page's chart is of."""
DEMO_HEADER = "X-Codedinvnet-Demo"
"""The header of requests that hurt workers: pages of other sites cannot send it."""


def page_state(service: Service, *, demo: bool) -> dict[str, Any]:
    """Return what the page shows."""
    front, served = service.front, service.served
    scheduler, now = front.scheduler, time.monotonic()
    return {
        "model": served.name,
        "image_shape": served.image_shape,
        "policy": scheduler.chosen.name,
        "k": scheduler.dispatcher.code.k,
        "demo": demo,
        "throughput": round(front.metrics.throughput(), 1),
        "percentiles": front.metrics.percentiles(),
        "answers": {
            outcome: int(front.metrics.queries.labels(outcome)._value.get()) for outcome in OUTCOMES
        },
        "lately": front.recent.summary(LATELY, scheduler.stats.normal),
        "decision": None
        if scheduler.dispatcher.decision is None
        else scheduler.dispatcher.decision.told,
        "agreement": front.metrics.live_agreement(),
        "releasing": None if front.reliance is None else front.reliance.releasing,
        "workers": [
            {
                "state": "silent"
                if silent(scheduler.assigner.workers[i].busy_since, now)
                else view.state,
                "queue": scheduler.load(i),
                "tasks": view.tasks,
                "restarts": view.restarts,
                "pid": None if view.state == STARTING else front.pool.pid(i),
            }
            for i, view in enumerate(front.workers)
        ],
        "groups": [
            {
                "members": [
                    {
                        "image": shown(served, inputs),
                        "outcome": view.outcomes.get(query, "waiting"),
                    }
                    for query, inputs in view.members.items()
                ],
            }
            for view in front.groups
        ],
    }


def silent(busy_since: float | None, now: float) -> bool:
    """Tell whether a worker has been at one task for a suspiciously long time."""
    return busy_since is not None and now - busy_since > SILENT_AFTER


def shown(served: Served, inputs: Mapping[str, np.ndarray]) -> str | None:
    """Return a query's image (C, H, W) as base64 of bytes; None if it is none."""
    if served.image_shape is None:
        return None
    (image,) = inputs.values()
    pixels = image if image.dtype == np.uint8 else (image * 255).round().astype(np.uint8)
    return base64.b64encode(pixels.tobytes()).decode()


def demo_requests(served: Served, images: np.ndarray | None = None) -> list[dict[str, Any]]:
    """Return requests for the page to send, of the protocol but for bytes, which are base64.

    Args:
        served: the model.
        images: (N, C, H, W) of bytes, one for each request; None: one request of zeros.
    """
    if images is not None:
        batches = [{IMAGES: image[None]} for image in images]
    else:
        batches = [zeros(served.signature)]
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


def demo_routes(front: FrontEnd, requests: Sequence[Mapping[str, Any]]) -> list[Route]:
    """Return those of the buttons: slow, stop, kill and heal a worker, and requests to send."""
    pool = front.pool

    async def to_send(_: Request) -> Response:
        return JSONResponse(requests)

    async def do(request: Request) -> Response:
        name, deed = request.path_params["worker"], request.path_params["deed"]
        if request.headers.get(DEMO_HEADER) != "1":
            raise HTTPException(403, f"the header {DEMO_HEADER}: 1 is needed")
        if name not in map(str, range(front.rules.workers)) or not isinstance(pool, FaultyPool):
            raise HTTPException(404, f"no worker {name}")
        worker = int(name)
        if front.workers[worker].state == STARTING:
            raise HTTPException(503, f"worker {worker} is starting")
        pid = pool.pid(worker)
        signals = {"kill": signal.SIGKILL, "stop": signal.SIGSTOP, "heal": signal.SIGCONT}
        if deed not in (*signals, "slow"):
            raise HTTPException(404, f"no deed {deed!r}: slow, stop, kill or heal")
        if pid is None and deed in ("kill", "stop"):
            up = front.workers[worker].state == "up"
            why = "runs on another machine: slow it instead" if up else "is being replaced"
            raise HTTPException(409, f"worker {worker} {why}")
        if deed in ("slow", "heal"):
            pool.clear(worker)
        if deed == "slow":
            pool.add(Fault(kind="slow", worker=worker, delay=Delay(ms=SLOW_MS)))
        elif pid is not None:
            with contextlib.suppress(ProcessLookupError):  # it has just ended
                os.kill(pid, signals[deed])
        log_event("demo", worker=worker, deed=deed)
        return JSONResponse({"worker": worker, "deed": deed})

    return [
        Route("/demo/requests", to_send),
        Route("/demo/workers/{worker}/{deed}", do, methods=["POST"]),
    ]
