"""Measure one trial: servers, a fault, a proxy and a load, each a process of this machine."""

from __future__ import annotations

import asyncio
import json
import os
import random
import resource
import signal
import socket
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
from benchmarks.peers import upstreams
from benchmarks.peers.contenders import CONTENDERS, TIMEOUT, Site
from benchmarks.processes import Running, descendants, process_stat, running
from codedinvnet.common.errors import UserError

WARM_UP = 400
"""Requests before those that are measured."""
JOINING = 1.0
"""Seconds in which members find one another."""
SILENT_FOR, SILENT_PERIOD = 5.0, 10.0
"""Seconds of every period in which the silent server is stopped."""
PERCENTILES = (50, 90, 99, 99.9)


@dataclass(frozen=True)
class Trial:
    """One measurement.

    Attributes:
        peer: one of CONTENDERS.
        fault: one of `upstreams.FAULTS`.
        load: share of the servers' capacity that the requests take, blocks left out.
        servers: how many.
        slots: requests that a proxy may have at a server at a time, where it must be told.
        seed: of arrivals, service times and faults.
        requests: that are measured.
        bursty: whether arrivals are; else Poisson.
        tuning: seconds, where something is tuned; else 0.
        kind: what the servers do, one of `upstreams.KINDS`.
        instances: of the contender; each request goes to one of them at random.
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
    kind: str = "timed"
    instances: int = 1

    @property
    def rate(self) -> float:
        """Requests a second."""
        return self.load * self.servers / upstreams.mean_service(self.fault, self.kind)

    @property
    def name(self) -> str:
        """The trial in words."""
        tuned = f", {1000 * self.tuning:g} ms" if self.tuning else ""
        busy = f"{100 * self.load:g} % busy, seed {self.seed}"
        several = f", {self.instances} instances" if self.instances > 1 else ""
        return f"{self.peer}{tuned}{several}, {self.fault}, {self.kind}, {busy}"

    @property
    def is_sensible(self) -> bool:
        """Whether the contender is for this situation."""
        one = CONTENDERS[self.peer]
        if one.several and self.instances == 1:
            return False
        return one.only in ("", self.kind) and not (one.copies and self.kind == "unnamed")

    @property
    def seconds(self) -> float:
        """About how long it takes."""
        return 2 + self.instances + (self.requests + WARM_UP) / self.rate


def kill(pid: int) -> None:
    """Kill a proxy with its processes, which may outlive it."""
    for each in (pid, *descendants(pid)):  # in this order: nginx starts workers again
        with suppress(ProcessLookupError):
            os.kill(each, signal.SIGKILL)


def wait_until_open(port: int, child: Running, log: Path) -> None:
    """Wait until a proxy answers, at most ten seconds."""
    for _ in range(100):
        with suppress(OSError):
            url = f"http://127.0.0.1:{port}/health"
            with urllib.request.urlopen(url, timeout=1) as reply:
                if reply.status == 200:
                    return
        if child.process.poll() is not None:
            break
        time.sleep(0.1)
    raise UserError(f"the proxy did not start: {log.read_text()[-500:]}")


class Fleet:
    """The servers of a trial, in processes that can be stopped and killed.

    Servers share a process unless theirs is harmed from outside, or computes a model.

    Args:
        trial: what they do.
        ports: one for each server.
        folder: for models and logs.
        stack: ends them.
    """

    def __init__(self, trial: Trial, ports: list[int], folder: Path, stack: ExitStack) -> None:
        self.trial, self.ports, self.folder = trial, ports, folder
        self.stack, self.over = stack, threading.Event()
        self.sizes = [1, len(ports) - 1] if trial.fault in upstreams.FROM_OUTSIDE else [len(ports)]
        if trial.fault == upstreams.STOPPED or trial.kind == "onnx":
            self.sizes = [1] * len(ports)
        if trial.kind == "onnx":
            upstreams.write_model(folder / "model.onnx")
        self.pids = [self._start(number) for number in range(len(self.sizes))]
        self.thread = threading.Thread(target=self._harm, daemon=True)

    def _start(self, number: int) -> int:
        """Start the process of this number; return its process's number."""
        if self.trial.fault == "refused" and number == 0:
            return 0
        first, trial = sum(self.sizes[:number]), self.trial
        ports = self.ports[first : first + self.sizes[number]]
        model = str(self.folder / "model.onnx") if trial.kind == "onnx" else ""
        spec = upstreams.Spec(ports, first, trial.fault, trial.seed, trial.kind, model)
        command = upstreams.command(spec)
        return self.stack.enter_context(
            running(*command, ready="ready", log=self.folder / "log")
        ).pid

    def _harm(self) -> None:
        fault, seconds = self.trial.fault, self.trial.requests / self.trial.rate
        if fault == "silent":
            while not self.over.wait(SILENT_PERIOD - SILENT_FOR):
                os.kill(self.pids[0], signal.SIGSTOP)
                self.over.wait(SILENT_FOR)
                os.kill(self.pids[0], signal.SIGCONT)
        elif fault == "killed" and not self.over.wait(seconds / 3):
            os.kill(self.pids[0], signal.SIGKILL)
            if not self.over.wait(seconds / 3):
                self.pids[0] = self._start(0)
        elif fault == upstreams.STOPPED:
            began = time.monotonic()
            for at, pid, number in stops(self.trial, self.pids):
                self.over.wait(max(0.0, began + at - time.monotonic()))
                os.kill(pid, number)

    def stop(self) -> None:
        """Harm them no longer; stopped ones go on."""
        self.over.set()
        if self.thread.ident is not None:
            self.thread.join()

    def work(self) -> tuple[float, int]:
        """Return the busy seconds and the requests started of all servers."""
        busy, started = 0.0, 0
        for port in [self.ports[sum(self.sizes[:number])] for number in range(len(self.sizes))]:
            with suppress(OSError), urllib.request.urlopen(f"http://127.0.0.1:{port}/stats") as got:
                for seconds, count in json.load(got):
                    busy, started = busy + seconds, started + count
        return busy, started


def stops(trial: Trial, pids: Sequence[int]) -> list[tuple[float, int, int]]:
    """Return when which process gets SIGSTOP or SIGCONT, in order, until all requests came.

    As often as `pareto` blocks a server, and as long; one that is stopped is not stopped again.
    """
    rng = np.random.default_rng([trial.seed, 11])
    now, found = 0.0, list[tuple[float, int, int]]()
    free = dict.fromkeys(pids, 0.0)
    while (now := now + rng.exponential(1 / (upstreams.SHARE * trial.rate))) < (
        (trial.requests + WARM_UP) / trial.rate
    ):
        pid = pids[int(rng.integers(len(pids)))]
        block = min(upstreams.BLOCK * (1 + rng.pareto(upstreams.SHAPE)), upstreams.LONGEST_BLOCK)
        if free[pid] < now:
            free[pid] = now + block
            found += [(now, pid, signal.SIGSTOP), (now + block, pid, signal.SIGCONT)]
    return sorted(found)


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


def measure(trial: Trial) -> dict[str, Any]:
    """Measure a trial, and return the figures."""
    count = trial.requests + WARM_UP
    times = arrivals(trial.rate, count, trial.seed, bursty=trial.bursty)
    ports = free_ports(trial.servers + trial.instances)
    ports, listens = ports[: trial.servers], ports[trial.servers :]
    with tempfile.TemporaryDirectory() as name, ExitStack() as stack:
        log = Path(name) / "log"
        fleet = Fleet(trial, ports, Path(name), stack)
        stack.callback(fleet.stop)
        proxies = []
        for port in listens:
            folder = Path(name) / str(port)
            folder.mkdir()
            given = (trial.slots, trial.tuning, listens)
            command = CONTENDERS[trial.peer].command(Site(folder, port, ports, *given))
            proxies.append(stack.enter_context(running(*command, ready="", log=log)))
            stack.callback(kill, proxies[-1].pid)
        for port, proxy in zip(listens, proxies, strict=True):
            wait_until_open(port, proxy, log)
        if CONTENDERS[trial.peer].several:
            time.sleep(JOINING)
        before = sum(processor_and_memory(proxy.pid)[0] for proxy in proxies)
        mine = resource.getrusage(resource.RUSAGE_SELF)
        fleet.thread.start()
        began = time.monotonic()
        bodies = [upstreams.request(number, trial.kind) for number in range(count)]
        path = upstreams.PATHS.get(trial.kind, "/v2/models/m/infer")
        content = upstreams.token if trial.kind == "streams" else None
        url, *others = (f"http://127.0.0.1:{port}{path}" for port in listens)
        load = Load(url, bodies, JSON, float(TIMEOUT), upstreams.is_answer, content, others)
        asyncio.run(load.run(times))
        wall = time.monotonic() - began
        own = resource.getrusage(resource.RUSAGE_SELF)
        used = own.ru_utime + own.ru_stime - mine.ru_utime - mine.ru_stime
        spent, held = zip(*(processor_and_memory(one.pid) for one in proxies), strict=True)
        busy, started = fleet.work()
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
        "processor_ms": round(1000 * (sum(spent) - before) / count, 4),
        "memory_mb": round(sum(held), 1),
        "client_processor": round(used / wall, 3),
    }


def shuffled(trials: Sequence[Trial], seed: int) -> list[Trial]:
    """Return the trials with the contenders of each situation one after the other, in random order.

    The situations keep their order, so that a run that is cut off has the first ones.
    """
    rng = random.Random(seed)
    situations: dict[tuple[object, ...], list[Trial]] = {}
    for one in trials:
        situation = (
            *(one.fault, one.load, one.servers, one.slots),
            *(one.seed, one.bursty, one.kind, one.instances),
        )
        situations.setdefault(situation, []).append(one)
    return [one for found in situations.values() for one in rng.sample(found, len(found))]
