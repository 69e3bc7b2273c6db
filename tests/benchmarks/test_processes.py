from __future__ import annotations

import os

import pytest

from benchmarks.processes import descriptors, memory, proportional_memory


@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="reads /proc")
def test_memory_and_descriptors() -> None:
    assert 10e6 < memory(os.getpid()) < 50e9
    assert 10e6 < proportional_memory(os.getpid()) <= 1.1 * memory(os.getpid())
    assert proportional_memory(2**22 + 1) == 0  # above the largest process number
    before = descriptors(os.getpid())
    read, write = os.pipe()
    assert descriptors(os.getpid()) == before + 2
    os.close(read)
    os.close(write)
