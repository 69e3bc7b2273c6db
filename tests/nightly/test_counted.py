from __future__ import annotations

import os

import pytest

from tests.nightly.outside import descriptors, memory


@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="reads /proc")
def test_memory_and_descriptors() -> None:
    assert 10e6 < memory(os.getpid()) < 50e9
    before = descriptors(os.getpid())
    read, write = os.pipe()
    assert descriptors(os.getpid()) == before + 2
    os.close(read)
    os.close(write)
