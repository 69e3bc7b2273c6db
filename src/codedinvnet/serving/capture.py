"""The last inputs of a service, in memory alone: what a protection can be made from."""

from __future__ import annotations

import io
from collections.abc import Mapping

import numpy as np

from codedinvnet.errors import UserError
from codedinvnet.models.base import DATATYPES, Signature


class Capture:
    """Keeps the last queries that were answered, in place of older ones.

    Args:
        signature: of the served model.
        count: how many are kept.

    Raises:
        UserError: if the model takes texts, or there is no memory for so many.
    """

    def __init__(self, signature: Signature, count: int) -> None:
        self.count, self.seen = count, 0
        try:
            self._kept = {
                spec.name: np.empty((count, *spec.shape), DATATYPES[spec.datatype])
                for spec in signature.inputs
            }
        except (MemoryError, ValueError) as error:
            raise UserError(f"--capture {count}: there is no memory for so many inputs") from error
        if any(array.dtype == object for array in self._kept.values()):
            raise UserError("--capture: the model takes texts, which no protection learns from")

    def keep(self, inputs: Mapping[str, np.ndarray]) -> None:
        """Keep the queries of an answered request, name -> (B, *shape).

        Images that came as floats in 0..1, where the model has bytes, are kept as bytes.
        """
        for name, kept in self._kept.items():
            rows = inputs[name][-self.count :]
            if kept.dtype == np.uint8 and np.issubdtype(rows.dtype, np.floating):
                rows = (rows * 255).round()
            begin = self.seen + len(inputs[name]) - len(rows)
            kept[(begin + np.arange(len(rows))) % self.count] = rows
        self.seen += len(next(iter(inputs.values())))

    def queries(self) -> dict[str, np.ndarray]:
        """Return a copy of what is kept, the oldest first: name -> (N, *shape)."""
        order = np.arange(max(0, self.seen - self.count), self.seen) % self.count
        return {name: kept[order] for name, kept in self._kept.items()}


def as_npz(queries: Mapping[str, np.ndarray]) -> bytes:
    """Return arrays as a file of `numpy.savez`."""
    content = io.BytesIO()
    np.savez(content, allow_pickle=False, **queries)
    return content.getvalue()
