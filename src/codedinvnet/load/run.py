"""Sends requests when they are due, whether or not others were answered, and tells how it went.

Latency counts from when a request was due: a server that stands still makes those that wait late,
too. A request without a right answer is infinitely late, so that a server gains nothing by shedding
load. A histogram is in the row, and may be added to those of other runs.
"""

from __future__ import annotations

import asyncio
import json
import math
import resource
import sys
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from statistics import fmean
from typing import Any

from codedinvnet.errors import UserError
from codedinvnet.evaluation.quantiles import Histogram, percentile, rounded
from codedinvnet.files import check_writable
from codedinvnet.load.loop import open_loop
from codedinvnet.load.options import RATE, LoadOptions, check, gaps_of, headers, server_and_model
from codedinvnet.load.requests import Arrays, from_file, generated, signature_of, written
from codedinvnet.provenance import describe_machine
from codedinvnet.rows import SCHEMA_VERSION, append_row, key_of, read_rows
from codedinvnet.serving.faces.v2 import OUTCOME_HEADER
from codedinvnet.serving.gateway.calls import OK, Call, NotProtocol, Reply, Unreachable
from codedinvnet.serving.gateway.upstreams import OwnHeaders, Upstream, open_upstream

START_TIMEOUT = 10.0
"""Seconds for what is asked before the load."""
FIRST = 10
"""Requests that are sent one after another before the load, and do not count."""
TRIES = 3
"""The first of them, all of which fail where a server does not take what they are written in."""
NO_ANSWER = "no answer"
"""What an error is called without a status."""
OTHER_FILES = 64
"""Files that a client has open beside its connections."""
PERCENTILES = {"p50": 0.5, "p90": 0.9, "p99": 0.99, "p999": 0.999}
LATE_MS = 5.0
"""A client that sends later than this cannot keep up."""


def percentiles(latencies: Sequence[float]) -> dict[str, float | None]:
    """Return percentiles of latencies in ms, and their mean and maximum; None: infinite."""
    found = {name: percentile(latencies, share) for name, share in PERCENTILES.items()}
    found |= {"mean": fmean(latencies), "max": max(latencies)}
    return {f"{name}_ms": rounded(value, 3) for name, value in found.items()}


@dataclass
class Ends:
    """How the requests of a load ended."""

    latency: list[float] = field(default_factory=list)
    """From when requests were due, in ms; infinite without a right answer."""
    late: list[float] = field(default_factory=list)
    """How late requests were sent, in ms."""
    answered: int = 0
    errors: Counter[str] = field(default_factory=Counter)
    wrong: int = 0
    """Answers that are not what was expected."""
    outcomes: Counter[str] = field(default_factory=Counter)
    """How answers came about, where the server says so in a header."""
    last: float = 0.0
    """When the last answer came, by `time.perf_counter`."""
    example: str = ""
    """What the first error said."""

    def failed(self, kind: str, said: str) -> None:
        """Take an error."""
        self.errors[kind] += 1
        self.example = self.example or said


class Sender:
    """Sends a load's requests to servers in turn, and takes down how they end.

    Args:
        upstreams: the servers.
        calls: sent in turn.
        timeout: seconds for an answer.
        expected: tells whether the answer to a request is right; None: all are.
    """

    def __init__(
        self,
        upstreams: Sequence[Upstream],
        calls: Sequence[Call],
        timeout: float,
        expected: Callable[[int, Reply], bool] | None = None,
    ) -> None:
        self.upstreams, self.calls, self.timeout = upstreams, calls, timeout
        self.expected, self.ends = expected, Ends()

    async def send(self, number: int, due: float) -> float:
        """Send a request; return its latency in ms, infinite if no right answer came."""
        latency = await self._answered(number, due)
        self.ends.latency.append(latency)
        return latency

    async def _answered(self, number: int, due: float) -> float:
        ends = self.ends
        ends.late.append(1000 * (time.perf_counter() - due))
        try:
            upstream = self.upstreams[number % len(self.upstreams)]
            reply = await upstream.infer(self.calls[number % len(self.calls)], self.timeout)
        except Unreachable as error:
            ends.failed(NO_ANSWER, str(error))
            return math.inf
        if reply.status != OK[reply.transport]:
            ends.failed(f"{reply.transport} {reply.status}", str(reply))
            return math.inf
        if self.expected is not None and not self.expected(number, reply):
            ends.wrong += 1
            return math.inf
        ends.answered += 1
        ends.last = time.perf_counter()
        ends.outcomes.update(value for name, value in reply.headers if name == OUTCOME_HEADER)
        return 1000 * (ends.last - due)


def calls_of(
    options: LoadOptions, requests: Sequence[Arrays], batched: bool, *, binary: bool
) -> list[Call]:
    """Return requests as they are sent."""
    url, model = server_and_model(options)
    found = []
    for arrays in requests:
        body, kind = written(arrays, batched, binary)
        call = Call(model, options.model_version, "http", body, kind, 0.0)
        if url.startswith("grpc"):
            from codedinvnet.serving.faces.v2_grpc import request_from_http

            length = next(value for name, value in kind if name != "content-type")
            message, _ = request_from_http(body, length, model, options.model_version)
            call = replace(call, transport="grpc", body=message, headers=())
        found.append(call)
    return found


async def first_calls(
    upstream: Upstream, options: LoadOptions, requests: Sequence[Arrays], batched: bool
) -> tuple[list[Call], str]:
    """Send some requests that do not count; return all, and how their tensors are written.

    A server over HTTP that answers no binary tensors gets JSON.

    Raises:
        UserError: if none is answered.
    """
    told = ""
    over_http = not options.url.startswith("grpc")
    for binary in (True, False) if over_http else (True,):
        calls = calls_of(options, requests, batched, binary=binary)
        sender = Sender([upstream], calls, options.timeout)
        for number in range(FIRST):
            await sender.send(number, time.perf_counter())
            silent = NO_ANSWER in sender.ends.errors  # which says nothing of the tensors
            if not sender.ends.answered and (silent or number + 1 == TRIES):
                break
        if sender.ends.answered:  # a server may fail now and then
            return calls, "binary" if binary else "JSON"
        told = told or sender.ends.example
        if silent:
            break
    raise UserError(f"{options.url}: the first requests failed: {told}")


def open_at_most(options: LoadOptions) -> int:
    """Return how many requests may be open, for each of which HTTP needs a connection.

    Tell if these are fewer than was asked for.
    """
    if options.url.startswith("grpc"):
        return options.max_open
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    files = options.max_open + OTHER_FILES
    if hard != resource.RLIM_INFINITY:
        files = min(files, hard)
    if soft != resource.RLIM_INFINITY and soft < files:
        resource.setrlimit(resource.RLIMIT_NOFILE, (files, hard))
    most = max(1, files - OTHER_FILES)
    if most < options.max_open:
        told = f"at most {most} requests are open: this process may have {hard} files (ulimit -Hn)"
        print(told, file=sys.stderr)
    return most


async def measure(options: LoadOptions) -> dict[str, Any]:
    """Send a load, and return its row.

    Raises:
        UserError: if the options, or the server, cannot work, or nothing was answered.
    """
    check(options)
    url, model = server_and_model(options)
    gaps = gaps_of(options)
    # The first request of a log is due at once, and no interval goes before it.
    rate = (len(gaps) - (gaps[0] == 0)) / sum(gaps) if any(gaps) else None
    own_headers = headers(options)
    own = OwnHeaders(own_headers)
    upstream = open_upstream(url, own=own, flag="URL", connect=options.timeout)
    upstream.tries = 1
    try:
        metadata = await upstream.metadata(model, options.model_version, START_TIMEOUT)
        signature, batched = signature_of(metadata, options.shapes)
        if not batched and options.batch > 1:
            raise UserError(f"--batch: {model} takes one query at a time")
        if options.inputs is None:
            requests = generated(signature, options.batch, options.seed)
        else:
            requests = from_file(options.inputs, signature, options.batch, options.seed)
        calls, written_as = await first_calls(upstream, options, requests, batched)
        sender, began = Sender([upstream], calls, options.timeout), time.perf_counter()
        label = f"{len(gaps)} at once" if rate is None else f"{rate:.4g} requests/s"
        most = open_at_most(options)
        unsent = await open_loop(sender.send, gaps, label, most=most)
        seconds = time.perf_counter() - began
    except (Unreachable, NotProtocol) as error:
        raise UserError(f"{options.url}: {error}") from error
    finally:
        await upstream.close()
    ends = sender.ends
    if not ends.answered:
        raise UserError(f"{options.url}: no request was answered: {ends.example or 'none sent'}")
    latency = ends.latency + unsent * [math.inf]
    settings = {
        "url": url,
        "model": model,
        "model_version": options.model_version,
        "tensors": written_as,
        "arrivals": options.arrivals,
        "rate_per_s": options.rate or (None if options.is_log else RATE),
        "duration_s": options.duration,
        "batch": options.batch,
        "inputs": None if options.inputs is None else str(options.inputs),
        "shapes": list(options.shapes),
        "headers": [name for name, _ in own_headers],  # values may be tokens
        "seed": options.seed,
        "timeout_s": options.timeout,
        "max_open": most,
    }
    return {
        "schema_version": SCHEMA_VERSION,
        "bench": "load",
        "key": key_of("load", settings),
        "settings": settings,
        "client": describe_machine(),
        "began": time.strftime("%Y-%m-%dT%H:%M:%S"),
        "requests": len(gaps),
        "offered_per_s": rate and round(rate, 3),
        "seconds": round(seconds, 3),
        "answered": ends.answered,
        "answered_per_s": round(ends.answered / (ends.last - began), 3),
        "unsent": unsent,
        "errors": dict(ends.errors),
        "outcomes": dict(ends.outcomes),
        **percentiles(latency),
        "sent_late_p99_ms": round(percentile(ends.late, 0.99), 3),
        "first_error": ends.example or None,
        "error": None,
        "histogram": Histogram.of(latency).as_json(),
    }


def run_load(options: LoadOptions) -> None:
    """Send a load and print what came of it; add its row to a file, if there is one.

    Raises:
        UserError: see `measure`; or if the file cannot be written, or holds no rows.
    """
    if options.out is not None:
        check_writable(options.out)
        read_rows(options.out)
    row = asyncio.run(measure(options))
    _tell(row, options)
    if options.out is not None:
        append_row(options.out, row)


def _tell(row: Mapping[str, Any], options: LoadOptions) -> None:
    if row["sent_late_p99_ms"] > LATE_MS:
        told = f"warning: this client is too slow: 1 % were sent {row['sent_late_p99_ms']} ms late"
        print(told, file=sys.stderr)
    if options.json:
        print(json.dumps(row))
        return
    shown = {**row["settings"], **row}
    shown |= {name: "never" for name, ms in row.items() if name.endswith("_ms") and ms is None}
    for name in ("schema_version", "key", "settings", "bench", "histogram"):
        del shown[name]
    width = max(map(len, shown))
    for name, value in shown.items():
        if value not in (None, {}, [], ""):
            print(f"{name:<{width}}  {value if isinstance(value, str) else json.dumps(value)}")
