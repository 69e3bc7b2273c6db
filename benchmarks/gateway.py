"""`python -m benchmarks gateway`: what a request costs more through the gateway than without it.

Triton answers a model that costs next to nothing. One connection at a time asks it, directly and
through the gateway in turn, over HTTP and over gRPC.
"""

from __future__ import annotations

import os
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from benchmarks.triton import MODEL, Triton, is_installed
from codedinvnet.bench.load import process_stat
from codedinvnet.errors import UserError
from codedinvnet.provenance import describe_machine

SIZES = {"image": 3 * 32 * 32, "600 KB": 150_000}
"""Floats of a request, and of its answer."""
ROUNDS, QUICK_ROUNDS = 20, 3
REQUESTS = 100
"""Requests of a round, each way."""
LINE = re.compile(r"on http://(\S+) and gRPC port (\d+)")


class Gateway(NamedTuple):
    """A running gateway."""

    pid: int
    http: str
    grpc: str

    @property
    def processor_seconds(self) -> float:
        """The processor time that it has taken so far."""
        stat = process_stat(self.pid)
        return (int(stat[11]) + int(stat[12])) / os.sysconf("SC_CLK_TCK")


@contextmanager
def running(*upstreams: str) -> Iterator[Gateway]:
    """Run `codedinvnet gateway` before upstreams."""
    command = [sys.executable, "-m", "codedinvnet", "gateway", MODEL]
    command += ["--port", "0", "--grpc-port", "0"]
    for url in upstreams:
        command += ["--upstream", url]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    ) as process:
        try:
            assert process.stdout is not None
            found = LINE.search(process.stdout.readline())
            if found is None:
                raise UserError("the gateway does not start")
            yield Gateway(process.pid, found[1], f"127.0.0.1:{found[2]}")
        finally:
            process.send_signal(signal.SIGTERM)


@contextmanager
def asking(module: Any, url: str, values: int) -> Iterator[Callable[[], Any]]:
    """Yield a function that sends one request of so many floats."""
    tensor = module.InferInput("x", [1, values], "FP32")
    tensor.set_data_from_numpy(np.random.default_rng(0).random((1, values), np.float32))
    with module.InferenceServerClient(url) as client:
        yield lambda: client.infer(MODEL, [tensor])


def times(ask: Callable[[], Any]) -> list[float]:
    """Return the milliseconds of each request of a round."""
    found = []
    for _ in range(REQUESTS):
        began = time.perf_counter()
        ask()
        found.append(1000 * (time.perf_counter() - began))
    return found


def compared(
    module: Any, direct: str, through: str, gateway: Gateway, values: int, rounds: int
) -> dict[str, float]:
    """Return the median of both ways, and the processor time of a request at the gateway."""
    seconds, arms = 0.0, ([], [])  # type: tuple[float, tuple[list[float], list[float]]]
    with asking(module, direct, values) as one, asking(module, through, values) as other:
        if one().as_numpy("y").tobytes() != other().as_numpy("y").tobytes():
            raise UserError("the answers differ")
        for _ in range(rounds):
            arms[0].extend(times(one))
            before = gateway.processor_seconds
            arms[1].extend(times(other))
            seconds += gateway.processor_seconds - before
    plain, more = (statistics.median(arm) for arm in arms)
    return {
        "direct_ms": round(plain, 3),
        "gateway_ms": round(more, 3),
        "over_ms": round(more - plain, 3),
        "processor_ms": round(1000 * seconds / (rounds * REQUESTS), 3),
    }


def run(*, quick: bool) -> dict[str, Any]:
    """Measure, and return the report.

    Raises:
        UserError: if there is no Triton.
    """
    import tritonclient.grpc
    import tritonclient.http

    if not is_installed():
        raise UserError("the benchmark needs Triton: tools/get_triton.sh installs it")
    report: dict[str, Any] = {"machine": describe_machine(), "load": os.getloadavg()[0]}
    with tempfile.TemporaryDirectory() as folder:
        triton = Triton(Path(folder))
        try:
            triton.start()
            for name, module, port, scheme in (
                ("http", tritonclient.http, triton.http, "http"),
                ("grpc", tritonclient.grpc, triton.grpc, "grpc"),
            ):
                direct = f"127.0.0.1:{port}"
                with running(f"{scheme}://{direct}") as gateway:
                    through = gateway.http if name == "http" else gateway.grpc
                    for size, values in SIZES.items():
                        rounds = QUICK_ROUNDS if quick else ROUNDS
                        report[f"{name}, {size}"] = compared(
                            module, direct, through, gateway, values, rounds
                        )
        finally:
            triton.kill()
    return report
