"""A worker process: read a task from a socket, compute it, write the output, one at a time.

The process ends when its socket does, so none outlives the front end; on Linux the kernel also
kills it with its parent, since a stopped process reads no socket.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import socket
import struct
import sys
from multiprocessing import forkserver

import numpy as np

from codedinvnet.serving import preload
from codedinvnet.serving.pool import WorkerSpec, freeze_loaded, run_task

REQUEST = struct.Struct("<QIB4IQ")
"""attempt, task number, type, (members, C, H, W), bytes that follow."""
REPLY = struct.Struct("<QBddQ")
"""attempt, status, seconds in all, seconds of encoding, bytes that follow."""
DTYPES = (np.dtype(np.uint8), np.dtype(np.float32))
OK, FAILED, READY = range(3)

PR_SET_PDEATHSIG = 1


def pack_request(attempt: int, number: int, images: np.ndarray) -> bytes:
    """Return the frame of a task."""
    head = REQUEST.pack(attempt, number, DTYPES.index(images.dtype), *images.shape, images.nbytes)
    return head + images.tobytes()


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


def die_with_parent() -> None:
    """Ask the kernel to kill this process when its parent ends, where it can (Linux).

    The parent is the fork server, which ends when nobody holds its pipe any more: let go of it, or
    a stopped worker would keep both alive.
    """
    pipe = getattr(forkserver._forkserver, "_forkserver_alive_fd", None)
    if pipe is not None:
        os.close(pipe)
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        if os.getppid() == 1:
            os._exit(0)


def yield_to_front_end() -> None:
    """Let the kernel not interrupt a process that wakes this one (Linux).

    Otherwise the front end, as it hands out a batch's tasks on a machine with few cores, is put
    aside by the first worker that it wakes, while other cores wait for the rest of the tasks.
    """
    if sys.platform == "linux":
        with contextlib.suppress(OSError):  # a container may forbid it
            os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))


def worker_main(stream: socket.socket, spec: WorkerSpec) -> None:
    """Serve tasks until the other end closes the stream."""
    die_with_parent()
    yield_to_front_end()
    # A terminal's Ctrl-C and a service manager's stop reach every process: the front end drains
    # first, then closes the streams.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        scheme = preload.load(spec)
    except Exception as error:
        message = f"{type(error).__name__}: {error}".encode()
        stream.sendall(REPLY.pack(0, FAILED, 0.0, 0.0, len(message)) + message)
        return
    freeze_loaded()
    try:
        stream.sendall(REPLY.pack(0, READY, 0.0, 0.0, 0))
        while True:
            head = REQUEST.unpack(receive(stream, REQUEST.size))
            attempt, number, dtype, *shape, size = head
            images = np.frombuffer(receive(stream, size), DTYPES[dtype]).reshape(shape)
            try:
                result = run_task(scheme, number, images)
                payload, times = result.output.tobytes(), (result.seconds, result.encode_seconds)
                status = OK
            except Exception as error:
                payload, times = f"{type(error).__name__}: {error}".encode(), (0.0, 0.0)
                status = FAILED
            stream.sendall(REPLY.pack(attempt, status, *times, len(payload)) + payload)
    except (EOFError, BrokenPipeError, ConnectionResetError):
        return
