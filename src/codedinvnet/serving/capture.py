"""The last inputs of a service, in memory alone: what a protection can be made from."""

from __future__ import annotations

import math
import zipfile
from collections import deque
from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from codedinvnet.errors import UserError
from codedinvnet.models.base import DATATYPES, Signature, TensorSpec
from codedinvnet.processes import usable_memory

SLICE = 1 << 20
"""Bytes of the file that are made at once, about."""


class Capture:
    """Keeps the last queries that were answered, in place of older ones.

    Args:
        signature: of the served model.
        count: how many are kept.

    Raises:
        UserError: if the model takes texts, or there is no memory for so many.
    """

    def __init__(self, signature: Signature, count: int) -> None:
        self.specs = signature.inputs
        if any(spec.datatype == "BYTES" for spec in self.specs):
            raise UserError("--capture: the model takes texts, which no protection learns from")
        size = sum(DATATYPES[s.datatype].itemsize * math.prod(s.shape) for s in self.specs)
        memory = usable_memory()
        if count * size > memory:
            raise UserError(
                f"--capture {count}: so many inputs take {count * size / 2**30:.3g} GiB, and there "
                f"are {memory / 2**30:.3g} for this process"
            )
        # What is in a row never changes: files that are being made have it as well.
        self._kept: deque[tuple[np.ndarray, ...]] = deque(maxlen=count)

    def keep(self, inputs: Mapping[str, np.ndarray]) -> None:
        """Keep the queries of an answered request, name -> (B, *shape).

        Images that came as floats in 0..1, where the model has bytes, are kept as bytes.
        """
        columns = []
        for spec in self.specs:
            dtype = DATATYPES[spec.datatype]
            rows = inputs[spec.name][-(self._kept.maxlen or 0) :]
            if dtype == np.uint8 and np.issubdtype(rows.dtype, np.floating):
                rows = (rows * 255).round()
            columns.append(rows.astype(dtype))
        self._kept.extend(zip(*columns, strict=True))

    def file(self) -> Iterator[bytes]:
        """Return a file of `numpy.savez` of what is kept by now, the oldest first, in slices.

        Its arrays are (N, *shape), by the names of the inputs. A slice is made when it is asked
        for, of rows of that one alone.
        """
        return _sliced(self.specs, tuple(self._kept))


class _Written:
    """Takes what is written, and hands it out."""

    def __init__(self) -> None:
        self._parts: list[bytes] = []

    def write(self, part: bytes) -> int:
        self._parts.append(bytes(part))
        return len(part)

    def flush(self) -> None:
        """There is nothing to be flushed."""

    def close(self) -> None:
        """There is nothing to be closed."""

    def taken(self) -> bytes:
        """Return what was written since."""
        whole = b"".join(self._parts)
        self._parts.clear()
        return whole


def _sliced(specs: Sequence[TensorSpec], rows: Sequence[tuple[np.ndarray, ...]]) -> Iterator[bytes]:
    written = _Written()
    with zipfile.ZipFile(written, "w") as archive:
        for place, spec in enumerate(specs):
            dtype = DATATYPES[spec.datatype]
            header = {
                "descr": np.lib.format.dtype_to_descr(dtype),
                "fortran_order": False,
                "shape": (len(rows), *spec.shape),
            }
            step = max(1, SLICE // max(1, dtype.itemsize * math.prod(spec.shape)))
            with archive.open(f"{spec.name}.npy", "w", force_zip64=True) as file:
                np.lib.format.write_array_header_1_0(file, header)
                for begin in range(0, len(rows), step):
                    part = [row[place] for row in rows[begin : begin + step]]
                    file.write(np.stack(part).tobytes())
                    yield written.taken()
    yield written.taken()
