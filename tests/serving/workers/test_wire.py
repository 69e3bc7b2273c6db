"""Arrays as messages between the front end and a worker."""

from __future__ import annotations

import numpy as np

from codedinvnet.serving.workers.process import ALIGNMENT, pack, unpack


def test_arrays_survive() -> None:
    arrays = {"a": np.arange(6.0).reshape(2, 3), "": np.array([b"", b"x"], object)}
    found = unpack(bytearray(pack(arrays)))
    assert list(found) == list(arrays)
    assert all((found[name] == array).all() for name, array in arrays.items())


def test_arrays_of_a_message_are_aligned_and_can_be_written_to() -> None:
    message = bytearray(pack({"a": np.zeros(3, np.uint8), "b": np.ones(2)}))
    assert len(message) % ALIGNMENT == 0
    found = unpack(message)["b"]
    assert found.flags.writeable
    found[1] = 5.0
    assert unpack(message)["b"].tolist() == [1, 5]
    begin = np.frombuffer(message, np.uint8).__array_interface__["data"][0]
    assert (found.__array_interface__["data"][0] - begin) % ALIGNMENT == 0
