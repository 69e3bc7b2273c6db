"""A client of the protocol, and its load in an open loop.

It shares nothing with the server but the table of datatypes.
"""

from __future__ import annotations

import asyncio
import json
import re
import time
from collections.abc import AsyncIterator, Iterable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
import numpy as np

from codedinvnet.errors import UserError
from codedinvnet.evaluation.load import open_loop
from codedinvnet.models.base import DATATYPE_OF, DATATYPES
from codedinvnet.simulation.arrivals import poisson_gaps


@dataclass(frozen=True)
class Reply:
    """What one request of B queries came to.

    Attributes:
        identity: the request's `id`, as it was sent.
        returned: the `id` in the response.
        status: the HTTP status; 0 if there was no response.
        rows: which inputs were sent.
        outcomes: `direct`, `decoded` or `guessed` for each query.
        labels: the classes with the highest scores, (B,) int64.
        latency: seconds from when the request was due.
        error: what went wrong.
        work: seconds of it that the server says it waited for workers (its `Server-Timing`).
    """

    identity: str
    rows: tuple[int, ...]
    latency: float
    status: int = 0
    returned: str = ""
    labels: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))
    outcomes: tuple[str, ...] = ()
    error: str = ""
    work: float = 0.0

    @property
    def ok(self) -> bool:
        """Whether the request was answered."""
        return self.status == 200


class Client:
    """Sends batches of queries with the binary extension.

    Args:
        session: open HTTP session.
        address: the server's.
        model: the model's name.
        inputs: the queries that requests choose from, (N, *shape) by the input's name.
        scores: the output with the scores of the classes.
    """

    def __init__(
        self,
        session: aiohttp.ClientSession,
        address: str,
        model: str,
        inputs: Mapping[str, np.ndarray],
        scores: str = "probabilities",
    ) -> None:
        self.session = session
        self.url = f"{address}/v2/models/{model}/infer"
        self.address = address
        self.inputs, self.scores = inputs, scores
        self.count = len(next(iter(inputs.values())))

    async def infer(self, identity: str, rows: Sequence[int], due: float | None = None) -> Reply:
        """Send one request and read its answer.

        Args:
            identity: the request's id.
            rows: which queries.
            due: when it should have been sent (`time.perf_counter`); latency counts from there.
        """
        began = time.perf_counter() if due is None else due
        rows = tuple(rows)
        batch = {name: array[list(rows)] for name, array in self.inputs.items()}
        head = json.dumps(
            {
                "id": identity,
                "inputs": [
                    {
                        "name": name,
                        "shape": list(array.shape),
                        "datatype": DATATYPE_OF[array.dtype],
                        "parameters": {"binary_data_size": array.nbytes},
                    }
                    for name, array in batch.items()
                ],
                "outputs": [
                    {"name": "outcome"},
                    {"name": self.scores, "parameters": {"binary_data": True}},
                ],
            }
        ).encode()
        sent = head + b"".join(array.tobytes() for array in batch.values())
        headers = {"Inference-Header-Content-Length": str(len(head))}
        try:
            async with self.session.post(self.url, data=sent, headers=headers) as response:
                body = await response.read()
        except (aiohttp.ClientError, asyncio.TimeoutError) as error:
            elapsed = time.perf_counter() - began
            return Reply(identity, rows, elapsed, error=f"{type(error).__name__}: {error}")
        latency = time.perf_counter() - began
        if response.status != 200:
            return Reply(identity, rows, latency, response.status, error=body.decode())
        length = int(response.headers["Inference-Header-Content-Length"])
        reply = json.loads(body[:length])
        outputs = {output["name"]: output for output in reply["outputs"]}
        told = outputs[self.scores]
        scores = np.frombuffer(body[length:], DATATYPES[told["datatype"]]).reshape(told["shape"])
        work = re.search(r"\bwork;dur=([\d.]+)", response.headers.get("Server-Timing", ""))
        return Reply(
            identity,
            rows,
            latency,
            200,
            reply.get("id", ""),
            scores.argmax(1),
            tuple(outputs["outcome"]["data"]),
            work=float(work[1]) / 1000 if work else 0.0,
        )

    async def load(
        self,
        requests: Sequence[Sequence[int]],
        *,
        rate: float,
        seed: int,
        label: str,
        leave: bool = False,
    ) -> list[Reply]:
        """Send requests at Poisson times, whether or not earlier ones were answered.

        Args:
            requests: of each the rows of its queries.
            rate: requests a second.
            seed: of the arrival times.
            label: of the progress bar, and the beginning of the requests' ids.
            leave: whether the progress bar stays when all is done.
        """
        replies: dict[int, Reply] = {}

        async def send(number: int, due: float) -> None:
            replies[number] = await self.infer(f"{label} {number}", requests[number], due)

        gaps = poisson_gaps(rate, len(requests), seed)
        await open_loop(send, gaps, label, leave=leave)
        return [replies[number] for number in range(len(requests))]

    async def warm(self, requests: Iterable[Sequence[int]], log: Path) -> None:
        """Send requests, one after another, so that every worker and path has run once.

        Args:
            requests: of each the rows of its queries.
            log: the service's, for the error.

        Raises:
            UserError: if one of the answers is an error.
        """
        for number, rows in enumerate(requests):
            reply = await self.infer(f"warm-{number}", rows)
            if not reply.ok:
                told = f"the service answered a first request with {reply.status}: see {log}"
                raise UserError(told)

    async def metrics(self) -> dict[str, float]:
        """Return the server's metrics, by name with labels."""
        async with self.session.get(f"{self.address}/metrics") as response:
            text = await response.text()
        lines = (line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#"))
        return {name: float(value) for name, value in lines}

    async def get(self, path: str) -> dict[str, Any]:
        """Return the JSON of a path: `times`, `page/state`."""
        async with self.session.get(f"{self.address}/{path}") as response:
            found: dict[str, Any] = await response.json()
        return found


@asynccontextmanager
async def connect(
    address: str,
    model: str,
    inputs: np.ndarray | Mapping[str, np.ndarray],
    scores: str = "probabilities",
) -> AsyncIterator[Client]:
    """Open a client with as many connections as the load needs; an array is a bundle's images."""
    arrays = {"images": inputs} if isinstance(inputs, np.ndarray) else inputs
    connector = aiohttp.TCPConnector(limit=0)
    timeout = aiohttp.ClientTimeout(total=60)
    async with aiohttp.ClientSession(connector=connector, timeout=timeout) as session:
        yield Client(session, address, model, arrays, scores)
