"""What workers send: which of it codes mix, and what is taken for an answer at all."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from codedinvnet.models.base import DATATYPES, Signature
from codedinvnet.serving.served import Served
from codedinvnet.serving.workers.pool import Task, WorkerFailed
from codedinvnet.serving.workers.result import OUTPUT, Computer, Result

if TYPE_CHECKING:
    from codedinvnet.codes.base import Scheme

Layout = Mapping[str, tuple[tuple[int, ...], np.dtype[np.generic]]]
"""Name -> shape and type, of a task's outputs."""


class Outputs:
    """Knows the outputs of every kind of task.

    Args:
        served: the model.
        scheme: decodes; None without a code and without a head.

    Attributes:
        filler: a query of zeros, which fills groups up.
        filler_output: what a code gets of it, (n,).
    """

    def __init__(self, served: Served, scheme: Scheme | None = None) -> None:
        self.served, self.scheme = served, scheme
        self.filler = zeros(served.signature)
        self.filler_output = np.zeros(0, np.float32)
        self._own: Layout = {
            spec.name: ((1, *spec.shape), DATATYPES[spec.datatype])
            for spec in served.signature.outputs
        }
        self._extra: dict[tuple[int, int], Layout] = {}
        """The layouts of extra tasks by their number and how many queries they are of."""

    def learn(self, computer: Computer) -> None:
        """Compute each kind of task of fillers, and their head once."""
        import torch

        assert self.scheme is not None
        rules = self.scheme.rules

        def outputs(task: int, members: int) -> Mapping[str, np.ndarray]:
            inputs = {name: np.repeat(rows, members, 0) for name, rows in self.filler.items()}
            return computer.compute(task, inputs)[0]

        own = outputs(0, len(rules.tasks(rules.k)[0].members))
        self._own, self.filler_output = layout(own), self.mixed(own)
        head = self.scheme.direct(torch.from_numpy(self.filler_output)[None])
        if head is None:  # all tasks are alike
            return
        for size in (rules.k,) if rules.fixed_size else range(1, rules.k + 1):
            extra = {n: len(t.members) for n, t in rules.tasks(size).items() if n >= rules.k}
            for task, members in extra.items():
                self._extra[task, members] = layout(outputs(task, members))

    def joined(
        self, queries: Sequence[Mapping[str, np.ndarray]], size: int
    ) -> dict[str, np.ndarray]:
        """Return the inputs of a task of so many queries: these, and fillers."""
        filled = [*queries, *[self.filler] * (size - len(queries))]
        return {name: self.served.joined([query[name] for query in filled]) for name in filled[0]}

    def mixed(self, outputs: Mapping[str, np.ndarray]) -> np.ndarray:
        """Return what the code gets of a task's outputs, (n,) float32."""
        found = outputs.get(OUTPUT)
        if found is None:
            found = outputs[self.served.decoded[0]]
        return np.asarray(found, np.float32).reshape(-1)

    def sound(self, task: Task, result: Result) -> Result:
        """Return a result that can be an answer, or be decoded together with others'.

        Raises:
            WorkerFailed: if it cannot.
        """
        wanted = self._extra.get((task.number, task.members), self._own)
        found = layout(result.outputs)
        if found != wanted:
            raise WorkerFailed(
                f"its outputs are {told(found)}, not {told(wanted)}: it may have another model"
            )
        if self.scheme is not None and not np.isfinite(self.mixed(result.outputs)).all():
            raise WorkerFailed("its output is not finite")
        return result


def layout(outputs: Mapping[str, np.ndarray]) -> Layout:
    """Return the names, shapes and types of outputs."""
    return {name: (array.shape, array.dtype) for name, array in outputs.items()}


def told(outputs: Layout) -> str:
    """Return a layout in words."""
    return ", ".join(f"{name} {dtype} {shape}".strip() for name, (shape, dtype) in outputs.items())


def zeros(signature: Signature) -> dict[str, np.ndarray]:
    """Return a query of zeros: name -> (1, *shape)."""
    return {
        spec.name: np.full(
            (1, *spec.shape), b"" if spec.datatype == "BYTES" else 0, DATATYPES[spec.datatype]
        )
        for spec in signature.inputs
    }
