"""What the fork server loads, so that the workers forked from it need not.

A worker is then ready in milliseconds, and all workers share one copy of the weights, in memory and
in the processors' caches. The fork server imports this module; what to load it finds in its
environment, since it is started without arguments.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
from dataclasses import asdict
from multiprocessing import forkserver
from pathlib import Path

import torch

from codedinvnet.codes.base import Scheme
from codedinvnet.serving.pool import WorkerSpec, freeze_loaded

VARIABLE = "CODEDINVNET_PRELOAD"


def start_fork_server(spec: WorkerSpec) -> None:
    """Start this process's fork server, if there is none yet, and let it load what `spec` names.

    Workers with another spec load for themselves, and so do those for a GPU or with several
    threads: neither a GPU's context nor a pool of threads outlives a fork.
    """
    plain = type(spec) is WorkerSpec and spec.threads == 1
    if plain and torch.device(spec.device).type == "cpu":
        os.environ[VARIABLE] = _key(spec)
    try:
        forkserver.ensure_running()
    finally:
        os.environ.pop(VARIABLE, None)


def kill_fork_server() -> None:
    """Kill this process's fork server; the next start of a worker starts another."""
    pid: int | None = forkserver._forkserver._forkserver_pid  # type: ignore[attr-defined]
    if pid is not None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def load(spec: WorkerSpec) -> Scheme:
    """Return the scheme of a worker: the fork server's, if that has loaded the same, or its own."""
    if _loaded is not None and _loaded[0] == _key(spec):
        return _loaded[1]
    return spec.load()


def _key(spec: WorkerSpec) -> str:
    return json.dumps({"type": type(spec).__qualname__, **asdict(spec)}, default=str)


def _load_named() -> tuple[str, Scheme] | None:
    key = os.environ.get(VARIABLE)
    if key is None:
        return None
    found = json.loads(key)
    del found["type"]
    part = found["part"]
    try:
        scheme = WorkerSpec(**{**found, "part": part and Path(part)}).load()
    except Exception:  # the workers will meet the same, and can tell
        return None
    freeze_loaded()
    return key, scheme


_loaded = _load_named()
