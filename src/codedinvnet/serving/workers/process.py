"""A worker process: read a task from a socket, compute it, write the output, one at a time.

The process ends when its socket does, so none outlives the front end. A stopped process reads no
socket: on Linux the kernel kills it when the front end lets go of its leash. The fork server, its
parent, may end before it.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import signal
import socket
import struct
import sys
from collections.abc import Mapping
from functools import lru_cache
from multiprocessing import forkserver
from multiprocessing.connection import Connection
from typing import TypeAlias

import numpy as np

from codedinvnet.common.devices import flush_denormals
from codedinvnet.common.errors import UserError
from codedinvnet.net.collector import freeze_loaded
from codedinvnet.net.protocol.tensors import DATATYPES, LENGTH, datatype_of, from_bytes, to_bytes
from codedinvnet.serving.workers import preload
from codedinvnet.serving.workers.computing import WorkerSpec
from codedinvnet.serving.workers.pool import InputRefused, Task, run_task

ALIGNMENT = 64
"""Each array of a message begins at a multiple of so many bytes."""


def pack(arrays: Mapping[str, np.ndarray]) -> bytes:
    """Return named arrays as a message: what they are, as JSON, and their bytes."""
    described, pieces = [], []
    for name, array in arrays.items():
        data = to_bytes(array)
        described.append((name, datatype_of(array), array.shape, len(data)))
        pieces += [data, bytes(-len(data) % ALIGNMENT)]
    return b"".join([_head(tuple(described)), *pieces])


def unpack(message: bytearray) -> dict[str, np.ndarray]:
    """Return the arrays of a message; they are views of it where they can be."""
    view = memoryview(message)
    start = LENGTH.size + LENGTH.unpack_from(view)[0]
    arrays = {}
    for name, datatype, shape, size in _described(bytes(view[LENGTH.size : start])):
        data = view[start : start + size]
        start += size + -size % ALIGNMENT
        if datatype == "BYTES" or sys.byteorder == "big":
            arrays[name] = from_bytes(data, datatype, shape)
        else:
            arrays[name] = np.frombuffer(data, DATATYPES[datatype]).reshape(shape)
    return arrays


_Described: TypeAlias = "tuple[tuple[str, str, tuple[int, ...], int], ...]"
"""The name, datatype and shape of each array, and how many bytes it has."""


@lru_cache(256)  # of one model there are few
def _head(described: _Described) -> bytes:
    head = json.dumps(described, separators=(",", ":")).encode()
    head += b" " * (-(len(head) + LENGTH.size) % ALIGNMENT)
    return LENGTH.pack(len(head)) + head


@lru_cache(256)
def _described(head: bytes) -> _Described:
    return tuple((name, kind, tuple(shape), size) for name, kind, shape, size in json.loads(head))


REQUEST = struct.Struct("<QIQ")
"""attempt, task number, bytes of the inputs' message that follows."""
REPLY = struct.Struct("<QBddQ")
"""attempt, status, seconds in all, seconds of encoding, bytes that follow: the outputs' message, or
what went wrong."""
OK, FAILED, READY, MISTAKEN, REFUSED = range(5)
"""The statuses: of an output, of a task or a start that failed, of a worker that has started, of a
start that failed by a user's mistake, and of an input that the model fails on."""


def pack_request(task: Task) -> bytes:
    """Return the message of a task."""
    inputs = pack(task.inputs)
    return REQUEST.pack(task.attempt, task.number, len(inputs)) + inputs


def receive(stream: socket.socket, count: int) -> bytearray:
    """Read exactly so many bytes.

    Raises:
        EOFError: if the stream ends before.
    """
    data = bytearray(count)
    view, got = memoryview(data), 0
    while got < count:
        part = stream.recv_into(view[got:])
        if part == 0:
            raise EOFError
        got += part
    return data


def hold_to(leash: Connection) -> None:
    """Ask the kernel to kill this process when the front end lets go of a leash (Linux).

    The fork server ends when no process holds its own pipe any more: let go of that, or a stopped
    worker would keep the fork server alive.
    """
    pipe = getattr(forkserver._forkserver, "_forkserver_alive_fd", None)
    if pipe is not None:
        os.close(pipe)
    if sys.platform == "linux":
        fcntl.fcntl(leash, fcntl.F_SETOWN, os.getpid())
        fcntl.fcntl(leash, fcntl.F_SETSIG, signal.SIGKILL)
        fcntl.fcntl(leash, fcntl.F_SETFL, fcntl.fcntl(leash, fcntl.F_GETFL) | os.O_ASYNC)
        if leash.poll():  # the front end was gone before
            os._exit(0)


def yield_to_front_end() -> None:
    """Let the kernel not interrupt a process that wakes this one (Linux).

    Otherwise the front end, as it hands out a batch's tasks on a machine with few cores, is put
    aside by the first worker that it wakes, while other cores wait for the rest of the tasks. A
    policy that the user gave the service stands, as that of `chrt --idle`.
    """
    if sys.platform == "linux":
        with contextlib.suppress(OSError):  # a container may forbid it
            if os.sched_getscheduler(0) == os.SCHED_OTHER:
                os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))


def worker_main(stream: socket.socket, leash: Connection, spec: WorkerSpec) -> None:
    """Serve tasks until the other end closes the stream, or lets go of the leash."""
    hold_to(leash)
    yield_to_front_end()
    # A terminal's Ctrl-C, its end, and a service manager's stop reach every process: the front end
    # drains first, then closes the streams.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    flush_denormals()  # for the threads that PyTorch starts while it loads
    try:
        computer = preload.load(spec)
    except Exception as error:
        message = f"{type(error).__name__}: {error}".encode()
        status = MISTAKEN if isinstance(error, UserError) else FAILED
        stream.sendall(REPLY.pack(0, status, 0.0, 0.0, len(message)) + message)
        return
    freeze_loaded()
    flush_denormals()  # whatever a user's model did while it was loaded
    try:
        stream.sendall(REPLY.pack(0, READY, 0.0, 0.0, 0))
        while True:
            attempt, number, size = REQUEST.unpack(receive(stream, REQUEST.size))
            inputs = unpack(receive(stream, size))
            try:
                result = run_task(computer, number, inputs)
                payload, times = pack(result.outputs), (result.seconds, result.encode_seconds)
                status = OK
            except InputRefused as error:
                payload, times, status = str(error).encode(), (0.0, 0.0), REFUSED
            except Exception as error:
                payload, times = f"{type(error).__name__}: {error}".encode(), (0.0, 0.0)
                status = FAILED
            stream.sendall(REPLY.pack(attempt, status, *times, len(payload)) + payload)
    except (EOFError, BrokenPipeError, ConnectionResetError):
        return
