"""Keeps what a process has loaded out of the garbage collector's rounds, which take 0.1 s each."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


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
