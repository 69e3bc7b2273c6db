"""Measure one trial: servers, a fault, a proxy and a load, each a process of this machine."""

from __future__ import annotations

import asyncio
import json
import os
import random
import resource
import signal
import socket
import subprocess
import tempfile
import threading
import time
import urllib.request
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.load import JSON, Load, arrivals
from benchmarks.peers import libraries, upstreams
from benchmarks.peers.contenders import CONTENDERS, TIMEOUT, Site
from benchmarks.processes import Running, descendants, process_stat, running
from codedinvnet.common.errors import UserError

WARM_UP = 400
"""Requests before those that are measured."""
SILENT_FOR, SILENT_PERIOD = 5.0, 10.0
"""Seconds of every period in which the silent server is stopped."""
PERCENTILES = (50, 90, 99, 99.9)


@dataclass(frozen=True)
class Trial:
    """One measurement.

    Attributes:
        peer: one of CONTENDERS or LIBRARIES.
        fault: one of `upstreams.FAULTS`.
        load: share of the servers' capacity that the requests take, blocks left out.
        servers: how many.
        slots: requests that a proxy may have at a server at a time, where it must be told.
        seed: of arrivals, service times and faults.
        requests: that are measured.
        bursty: whether arrivals are; else Poisson.
        tuning: seconds, where something is tuned; else 0.
    """

    peer: str
    fault: str
    load: float
    servers: int = 8
    slots: int = 1
    seed: int = 1
    requests: int = 8000
    bursty: bool = False
    tuning: float = 0.0

    @property
    def name(self) -> str:
        """The trial in words."""
        tuned = f", {1000 * self.tuning:g} ms" if self.tuning else ""
        return f"{self.peer}{tuned}, {self.fault}, {100 * self.load:g} % busy, seed {self.seed}"

    @property
    def seconds(self) -> float:
        """About how long it takes."""
        rate = self.load * self.servers / upstreams.mean_service(self.fault)
        return 3 + (self.requests + WARM_UP) / rate


def kill(pid: int) -> None:
    """Kill a proxy with its processes, which may outlive it."""
    for each in (pid, *descendants(pid)):  # in this order: nginx starts workers again
        with suppress(ProcessLookupError):
            os.kill(each, signal.SIGKILL)


def wait_until_open(port: int, child: Running, log: Path) -> None:
    """Wait until a proxy answers, at most ten seconds."""
    for _ in range(100):
        with suppress(OSError):
            url = f"http://127.0.0.1:{port}/v2/models/m/ready"
            with urllib.request.urlopen(url, timeout=1) as reply:
                if reply.status == 200:
                    return
        if child.process.poll() is not None:
            break
        time.sleep(0.1)
    raise UserError(f"the proxy did not start: {log.read_text()[-500:]}")


class FirstServer(threading.Thread):
    """Stops, kills and starts the process of the first server, as a fault says."""

    def __init__(self, fault: str, spec: upstreams.Spec, log: Path, seconds: float) -> None:
        super().__init__(daemon=True)
        self.fault, self.spec, self.log, self.seconds = fault, spec, log, seconds
        self.over = threading.Event()
        self.stack = ExitStack()
        self.process = self._start_server()

    def _start_server(self) -> subprocess.Popen[str]:
        command = upstreams.command(self.spec)
        return self.stack.enter_context(running(*command, ready="ready", log=self.log)).process

    def run(self) -> None:
        if self.fault == "silent":
            while not self.over.wait(SILENT_PERIOD - SILENT_FOR):
                self.process.send_signal(signal.SIGSTOP)
                self.over.wait(SILENT_FOR)
                self.process.send_signal(signal.SIGCONT)
        elif not self.over.wait(self.seconds / 3):
            self.process.kill()
            if not self.over.wait(self.seconds / 3):
                self.process = self._start_server()

    def stop(self) -> None:
        """End the server."""
        self.over.set()
        if self.ident is not None:
            self.join()
        self.stack.close()


def free_ports(count: int) -> list[int]:
    """Return unused ports below those that Linux gives to outgoing connections."""
    found: list[int] = []
    for port in random.sample(range(15_000, 32_000), 1000):
        with socket.socket() as trial, suppress(OSError):
            trial.bind(("127.0.0.1", port))
            found.append(port)
        if len(found) == count:
            break
    return found


def processor_and_memory(pid: int) -> tuple[float, float]:
    """Return the processor seconds and the peak resident MB of a process and its children."""
    tick, seconds, memory = os.sysconf("SC_CLK_TCK"), 0.0, 0.0
    for each in (pid, *descendants(pid)):
        if stat := process_stat(each):
            seconds += (int(stat[11]) + int(stat[12])) / tick
            with suppress(OSError, StopIteration):
                lines = Path(f"/proc/{each}/status").read_text(encoding="ascii").splitlines()
                peak = next(line for line in lines if line.startswith("VmHWM"))
                memory += int(peak.split()[1]) / 1024
    return seconds, memory


def work(ports: list[int]) -> tuple[float, int]:
    """Return the busy seconds and the requests started of servers, asked at one port a process."""
    busy, started = 0.0, 0
    for port in ports:
        with suppress(OSError), urllib.request.urlopen(f"http://127.0.0.1:{port}/stats") as reply:
            for seconds, count in json.load(reply):
                busy, started = busy + seconds, started + count
    return busy, started


def measure(trial: Trial) -> dict[str, Any]:
    """Measure a trial, and return the figures."""
    rate = trial.load * trial.servers / upstreams.mean_service(trial.fault)
    count = trial.requests + WARM_UP
    times = arrivals(rate, count, trial.seed, bursty=trial.bursty)
    *ports, fallback, listens = free_ports(trial.servers + 2)
    apart = trial.fault in upstreams.FROM_OUTSIDE
    with tempfile.TemporaryDirectory() as name, ExitStack() as stack:
        folder = Path(name)
        log = folder / "log"
        first = upstreams.Spec(ports[:1], 0, trial.fault, trial.seed)
        rest = upstreams.Spec(ports[apart:], int(apart), trial.fault, trial.seed)
        stack.enter_context(running(*upstreams.command(rest), ready="ready", log=log))
        if trial.peer == "ours-fallback":
            cheap = upstreams.Spec([fallback], 1000, "none", trial.seed)
            stack.enter_context(running(*upstreams.command(cheap), ready="ready", log=log))
        harm = None
        if apart and trial.fault != "refused":
            harm = FirstServer(trial.fault, first, log, float(times[-1]))
            stack.callback(harm.stop)
        site = Site(folder, listens, ports, trial.slots, trial.tuning, fallback)
        proxy = None
        if trial.peer in CONTENDERS:
            proxy = stack.enter_context(running(*CONTENDERS[trial.peer](site), ready="", log=log))
            stack.callback(kill, proxy.pid)
            wait_until_open(site.port, proxy, log)
            before = processor_and_memory(proxy.pid)[0]
        mine = resource.getrusage(resource.RUSAGE_SELF)
        if harm is not None:
            harm.start()
        began = time.monotonic()
        bodies = [upstreams.request(number) for number in range(count)]
        url = f"http://127.0.0.1:{site.port}/v2/models/m/infer"
        load = Load(url, bodies, JSON, float(TIMEOUT), upstreams.is_answer)
        if proxy is None:
            asyncio.run(libraries.send(load, site, trial.peer, times))
        else:
            asyncio.run(load.run(times))
        wall = time.monotonic() - began
        own = resource.getrusage(resource.RUSAGE_SELF)
        used = own.ru_utime + own.ru_stime - mine.ru_utime - mine.ru_stime
        if proxy is None:
            seconds, memory = used, own.ru_maxrss / 1024
        else:
            seconds, memory = processor_and_memory(proxy.pid)
            seconds -= before
        asked = [ports[apart], *([fallback] if trial.peer == "ours-fallback" else [])]
        busy, started = work(asked if not apart or trial.fault == "refused" else [ports[0], *asked])
    found = load.latencies[WARM_UP:]
    good = int(np.isfinite(found).sum())
    tail = np.minimum(found, 1000 * TIMEOUT)  # an error is as bad as the longest wait
    row: dict[str, Any] = {
        f"p{level:g}": round(float(np.quantile(tail, level / 100)), 2) for level in PERCENTILES
    }
    wrong = load.errors.pop("wrong", 0)
    return row | {
        "errors": load.errors.total(),
        "statuses": dict(load.errors),
        "wrong": wrong,
        "work": round(started / count, 4),
        "busy": round(busy / count, 6),
        "goodput": round(good / (wall * trial.requests / count), 1),
        "processor_ms": round(1000 * seconds / count, 4),
        "memory_mb": round(memory, 1),
        "client_processor": round(used / wall, 3),
    }


def shuffled(trials: Sequence[Trial], seed: int) -> list[Trial]:
    """Return the trials with the contenders of each situation one after the other, in random order.

    The situations keep their order, so that a run that is cut off has the first ones.
    """
    rng = random.Random(seed)
    situations: dict[tuple[object, ...], list[Trial]] = {}
    for one in trials:
        situation = (one.fault, one.load, one.servers, one.slots, one.seed, one.bursty)
        situations.setdefault(situation, []).append(one)
    return [one for found in situations.values() for one in rng.sample(found, len(found))]
