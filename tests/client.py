"""A client that sends a model's images to its service by the Open Inference Protocol."""

from __future__ import annotations

import json
import time
from collections.abc import AsyncIterator, Iterable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.load import arrivals, open_loop
from codedinvnet.common.errors import UserError
from codedinvnet.net.client import Answer, HttpClient, described, parse_origin
from codedinvnet.net.protocol.http import parse_response, render_request
from codedinvnet.net.protocol.messages import HEADER_LENGTH, InferRequest, RequestedOutput

TIMEOUT = 60.0
"""Seconds for an answer, connecting included."""
OUTCOME = "outcome"
TENSORS = ("images", "probabilities")
"""The input and the scores of a bundle."""


@dataclass(frozen=True)
class Reply:
    """What one request of B queries came to.

    Attributes:
        identity: the request's `id`, as it was sent.
        rows: which images were sent.
        latency: seconds from when the request was due.
        status: the HTTP status; 0 if there was no response.
        returned: the `id` in the response.
        scores: the answers, (B, classes).
        outcomes: `direct`, `decoded` or `guessed` for each query.
        error: what went wrong.
    """

    identity: str
    rows: tuple[int, ...]
    latency: float
    status: int = 0
    returned: str = ""
    scores: np.ndarray = field(default_factory=lambda: np.zeros((0, 1), np.float32))
    outcomes: tuple[str, ...] = ()
    error: str = ""

    @property
    def labels(self) -> np.ndarray:
        """The classes with the highest scores, (B,) int64."""
        labels: np.ndarray = self.scores.argmax(1)
        return labels

    @property
    def ok(self) -> bool:
        """Whether the request was answered."""
        return self.status == 200


class Client:
    """Sends a model's images to its service.

    Args:
        address: the service's, http://HOST:PORT.
        model: the model's name.
        images: those that requests choose from, (N, C, H, W).
        tensors: the names of the model's input and of its scores.
    """

    def __init__(
        self, address: str, model: str, images: np.ndarray, tensors: tuple[str, str] = TENSORS
    ) -> None:
        self.address, self.images = address, images
        self.input, self.output = tensors
        self.path = f"/v2/models/{model}/infer"
        self.http = HttpClient(parse_origin(address, "address"), connect=TIMEOUT)

    async def post(self, body: bytes, headers: dict[str, str]) -> Answer:
        """Return the answer to a request for inference.

        Raises:
            OSError: if there is none.
        """
        return await self.http.ask("POST", self.path, TIMEOUT, body, [*headers.items()])

    async def infer(self, identity: str, rows: Sequence[int], due: float | None = None) -> Reply:
        """Send a request of some images; its latency counts from when it was due."""
        began, rows = time.perf_counter() if due is None else due, tuple(rows)
        wanted = (RequestedOutput(OUTCOME), RequestedOutput(self.output, binary=True))
        request = InferRequest({self.input: self.images[list(rows)]}, identity, outputs=wanted)
        body = render_request(request)
        try:
            answer = await self.post(body.data, body.headers)
        except OSError as error:
            return Reply(identity, rows, time.perf_counter() - began, error=described(error))
        latency = time.perf_counter() - began
        if answer.status != 200:
            told = answer.body.decode(errors="replace")
            return Reply(identity, rows, latency, answer.status, error=told)
        response = parse_response(answer.body, answer.field(HEADER_LENGTH) or None)
        return Reply(
            identity,
            rows,
            latency,
            200,
            response.id or "",
            response.outputs[self.output],
            tuple(outcome.decode() for outcome in response.outputs[OUTCOME]),
        )

    async def load(
        self, requests: Sequence[Sequence[int]], *, rate: float, seed: int, label: str
    ) -> list[Reply]:
        """Send requests of rows at Poisson times; return the replies in the requests' order.

        The label is the progress bar's, and the beginning of the requests' ids.
        """
        replies: dict[int, Reply] = {}

        async def send(number: int, due: float) -> None:
            replies[number] = await self.infer(f"{label} {number}", requests[number], due)

        await open_loop(send, arrivals(rate, len(requests), seed), label, leave=False)
        return [replies[number] for number in range(len(requests))]

    async def warm(self, requests: Iterable[Sequence[int]], log: Path) -> None:
        """Send requests one after another, so that every worker and path has run once."""
        for number, rows in enumerate(requests):
            reply = await self.infer(f"warm-{number}", rows)
            if not reply.ok:
                told = f"the service answered a first request with {reply.status}: see {log}"
                raise UserError(told)

    async def metrics(self) -> dict[str, float]:
        """Return the server's metrics, by name with labels."""
        text = (await self.http.ask("GET", "/metrics", TIMEOUT)).body.decode()
        lines = (line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#"))
        return {name: float(value) for name, value in lines}

    async def get(self, path: str) -> dict[str, Any]:
        """Return the JSON of a path, such as `page/state`."""
        found: dict[str, Any] = json.loads((await self.http.ask("GET", f"/{path}", TIMEOUT)).body)
        return found


@asynccontextmanager
async def connect(
    address: str, model: str, images: np.ndarray, tensors: tuple[str, str] = TENSORS
) -> AsyncIterator[Client]:
    """Open a client with as many connections as the load needs."""
    client = Client(address, model, images, tensors)
    try:
        yield client
    finally:
        client.http.close()
