"""`python -m benchmarks gateway`: what a request costs more through the gateway than without it.

Triton answers a model that costs next to nothing. One connection at a time asks it, directly and
through the gateway in turn, over HTTP; and through nginx, which only passes on, where that is
installed.
"""

from __future__ import annotations

import math
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.triton import MODEL, Triton, is_installed
from codedinvnet.common.errors import UserError
from codedinvnet.common.processes import Running, free_port, processor_time, running
from codedinvnet.common.provenance import describe_machine

SIZES = {"image": 3 * 32 * 32, "600 KB": 150_000}
"""Floats of a request, and of its answer."""
ROUNDS, QUICK_ROUNDS = 20, 3
REQUESTS = 100
"""Requests of a round, each way."""
NGINX = """
daemon off; master_process off; pid {folder}/pid; error_log {folder}/error.log;
events {{ }}
http {{
    access_log off; client_max_body_size 0; client_body_buffer_size 2m;
    proxy_buffers 8 256k; proxy_buffer_size 256k;
    client_body_temp_path {folder}/body; proxy_temp_path {folder}/proxy;
    fastcgi_temp_path {folder}/fastcgi; uwsgi_temp_path {folder}/uwsgi;
    scgi_temp_path {folder}/scgi;
    upstream over_http {{ server {http}; keepalive 16; }}
    server {{
        listen 127.0.0.1:{port};
        location / {{
            proxy_pass http://over_http; proxy_http_version 1.1; proxy_set_header Connection "";
        }}
    }}
}}
"""


def gateway_to(url: str) -> AbstractContextManager[Running]:
    """Run `codedinvnet gateway` in front of an upstream."""
    words = ("codedinvnet", "gateway", "--port", "0", "--upstream", url)
    return running(sys.executable, "-m", *words)


@contextmanager
def nginx(folder: Path, http: str) -> Iterator[str | None]:
    """Run nginx in front of Triton; yields its address, None if there is no nginx."""
    program = shutil.which("nginx", path=f"{os.environ.get('PATH', '')}:/usr/sbin")
    if program is None:
        yield None
        return
    port = free_port()
    settings = folder / "nginx.conf"
    settings.write_text(NGINX.format(folder=folder, http=http, port=port))
    command = [program, "-e", str(folder / "nginx.log"), "-c", str(settings)]
    with subprocess.Popen(command, stderr=subprocess.DEVNULL) as process:
        try:
            time.sleep(1)
            yield f"127.0.0.1:{port}"
        finally:
            process.terminate()


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


def processor_seconds(pid: int) -> float:
    """Return the seconds of processor time that a process has taken; NaN if nobody says it."""
    found = processor_time(pid)
    return math.nan if found is None else found.first


def compared(
    module: Any, ways: Mapping[str, str], pid: int, values: int, rounds: int
) -> dict[str, float]:
    """Return the median of each way, and the processor time of a request at the gateway.

    Args:
        module: Triton's client.
        ways: name -> address; "direct" is the first, "gateway" another.
        pid: the gateway's process.
        values: floats of a request.
        rounds: of each way.
    """
    seconds, arms = 0.0, {name: list[float]() for name in ways}
    with ExitStack() as stack:
        asks = {
            name: stack.enter_context(asking(module, url, values)) for name, url in ways.items()
        }
        if len({ask().as_numpy("y").tobytes() for ask in asks.values()}) > 1:
            raise UserError("the answers differ")
        for _ in range(rounds):
            for name, ask in asks.items():
                before = processor_seconds(pid)
                arms[name].extend(times(ask))
                if name == "gateway":
                    seconds += processor_seconds(pid) - before
    medians = {name: statistics.median(arm) for name, arm in arms.items()}
    return {
        **{f"{name}_ms": round(median, 3) for name, median in medians.items()},
        **{
            f"{name}_over_ms": round(median - medians["direct"], 3)
            for name, median in medians.items()
            if name != "direct"
        },
        "processor_ms": round(1000 * seconds / (rounds * REQUESTS), 3),
    }


def run(*, quick: bool) -> dict[str, Any]:
    """Measure, and return the report.

    Raises:
        UserError: if there is no Triton.
    """
    import tritonclient.http

    if not is_installed():
        raise UserError("the benchmark needs Triton: tools/get_triton.sh installs it")
    report: dict[str, Any] = {"machine": describe_machine(), "load": os.getloadavg()[0]}
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        triton = Triton(Path(folder))
        try:
            triton.start()
            direct = f"127.0.0.1:{triton.http}"
            plain = stack.enter_context(nginx(Path(folder), direct))
            with gateway_to(f"http://{direct}") as gateway:
                ways = {"direct": direct, "gateway": gateway.address.removeprefix("http://")}
                if plain is not None:
                    ways["nginx"] = plain
                for size, values in SIZES.items():
                    rounds = QUICK_ROUNDS if quick else ROUNDS
                    report[f"http, {size}"] = compared(
                        tritonclient.http, ways, gateway.pid, values, rounds
                    )
        finally:
            triton.kill()
    return report
