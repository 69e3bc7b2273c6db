"""What a process that serves does with its memory: what it collects, and what it keeps."""

from __future__ import annotations

import ctypes
import gc
from collections.abc import Iterator
from contextlib import contextmanager

TRIM_THRESHOLD, MMAP_THRESHOLD = -1, -3
"""Settings of glibc's allocator, as its `malloc.h` numbers them."""
KEPT, LARGEST_KEPT = 64 << 20, 32 << 20
"""Bytes of freed memory that are kept, and of a block that is taken from them, at most."""


def keep_freed() -> None:
    """Keep freed memory for what comes next, where the allocator is glibc's.

    Otherwise every copy of a large body is made in fresh pages, and each of them costs a fault.
    The faults took longer than the copies.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(TRIM_THRESHOLD, KEPT)
        mallopt(MMAP_THRESHOLD, LARGEST_KEPT)


def freeze_loaded() -> None:
    """Keep what this process has loaded out of the garbage collector's rounds, for good.

    Walking through PyTorch's objects takes 0.1 s, in which a front end or a worker does nothing
    else; it was what the slowest of a thousand requests waited for.
    """
    gc.collect()
    gc.freeze()


@contextmanager
def sparing_collector() -> Iterator[None]:
    """Keep what is loaded out of the garbage collector's rounds: 0.1 s a round, with PyTorch.

    A client that pauses would count its own pauses as the service's.
    """
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()
