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
import threading
from dataclasses import asdict
from multiprocessing import current_process, forkserver

import torch
from pydantic import TypeAdapter

from codedinvnet.common.errors import UserError
from codedinvnet.net.collector import freeze_loaded
from codedinvnet.serving.workers.computing import BundleSpec, ModelSpec, WorkerSpec
from codedinvnet.serving.workers.pool import Computer

SPECS: tuple[type, ...] = (BundleSpec, ModelSpec)
"""What a fork server can load; workers load any other kind themselves."""
VARIABLE = "CODEDINVNET_PRELOAD"
_replacing = threading.Lock()


def start_fork_server(spec: WorkerSpec) -> None:
    """Start this process's fork server, if there is none yet, and let it load what `spec` names.

    Workers with another spec load for themselves, and so do those for a GPU or with several
    threads: neither a GPU's context nor a pool of threads outlives a fork.
    """
    plain = type(spec) in SPECS and spec.threads == 1
    if plain and torch.device(spec.device).type == "cpu":
        os.environ[VARIABLE] = _key(spec)
    try:
        forkserver.ensure_running()
    finally:
        os.environ.pop(VARIABLE, None)


def fork_server() -> int | None:
    """Return the number of this process's fork server, which may be dead; None without one."""
    pid: int | None = forkserver._forkserver._forkserver_pid  # type: ignore[attr-defined]
    return pid


def kill_fork_server() -> None:
    """Kill this process's fork server; the next start of a worker starts another."""
    pid = fork_server()
    if pid is not None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def replace_fork_server(pid: int | None, spec: WorkerSpec) -> None:
    """End a fork server that cannot be reached, and start another in a folder of its own.

    If this process has another one than `pid` by now, that one stays.
    """
    with _replacing:
        now = fork_server()
        if now in (None, pid):
            if now is not None:
                kill_fork_server()
                with contextlib.suppress(ChildProcessError):  # multiprocessing asks for it, too
                    os.waitid(os.P_PID, now, os.WEXITED | os.WNOWAIT)
            current_process()._config["tempdir"] = None  # type: ignore[attr-defined]
        start_fork_server(spec)


def load(spec: WorkerSpec) -> Computer:
    """Return what a worker computes with: the fork server's, if that has loaded it, or its own.

    Raises:
        UserError: if it set the number of threads as it computed. Those of the fork server are lost
            in a worker, which would wait for them for ever.
    """
    if _loaded is None or _loaded[0] != _key(spec):
        return spec.load()
    _, computer, threads = _loaded
    if threads != spec.threads:
        raise UserError(
            f"the model sets PyTorch's threads to {threads} when it computes: take "
            f"torch.set_num_threads out of it, or say --set threads-per-worker={threads}"
        )
    return computer


def _key(spec: WorkerSpec) -> str:
    place = SPECS.index(type(spec)) if type(spec) in SPECS else type(spec).__qualname__
    return json.dumps([place, asdict(spec)], default=str)


def _load_named() -> tuple[str, Computer, int] | None:
    """Return what is loaded: by which key, and how many threads PyTorch has afterwards."""
    key = os.environ.get(VARIABLE)
    if key is None:
        return None
    place, found = json.loads(key)
    try:
        spec: WorkerSpec = TypeAdapter(SPECS[place]).validate_python(found)
        computer = spec.load()
    except Exception:  # the workers will meet the same, and can tell
        return None
    freeze_loaded()
    return key, computer, torch.get_num_threads()


_loaded = _load_named()
