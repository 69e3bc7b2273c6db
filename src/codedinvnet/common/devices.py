"""Where a module computes, and how precisely a GPU does."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain

import torch
from torch import Tensor, nn


def first_tensor(module: nn.Module) -> Tensor:
    """Return a tensor of a module's device and type: a weight, a buffer, or else an empty one."""
    tensors = chain(module.parameters(), module.buffers())
    return next((t for t in tensors if t.is_floating_point()), torch.empty(0))


def use_whole_float32() -> None:
    """Have all of this process compute in whole float32 on GPUs, from now on.

    PyTorch's default for convolutions, TF32, rounds to one part in 2,000: the fixed-point inverse
    of an i-ResNet would not get down to its tolerance, and decoding multiplies an error by k. This
    is for processes of our own; a program that loads a bundle decides for itself.
    """
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False


def flush_denormals() -> None:
    """Have the CPU take numbers below 1e-38 for zero in this thread, and in those it starts.

    It computes with such numbers up to 200 times as slowly as with others. Inputs or weights that
    lead to them make a worker slow, and a hedge's worker just as slow.

    PyTorch starts threads of its own with the first operation that is large enough for them. They
    inherit this, and cannot be reached later: call it before.
    """
    torch.set_flush_denormal(True)


@contextmanager
def denormals_kept() -> Iterator[None]:
    """Let this thread take denormal numbers in the end as it did before, whatever happens."""
    flushed = not torch.full((8,), 1e-30).mul(1e-10).any()
    try:
        yield
    finally:
        torch.set_flush_denormal(flushed)


@contextmanager
def denormals_flushed() -> Iterator[None]:
    """Do what `flush_denormals` does for a time: gradients behind a GELU get that small.

    Threads that PyTorch has started before stay slow with such numbers, and all wait for them.
    """
    with denormals_kept():
        flush_denormals()
        yield


@contextmanager
def whole_float32() -> Iterator[None]:
    """Do what `use_whole_float32` does for a time; not for several threads at once."""
    before = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
    use_whole_float32()
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = before
