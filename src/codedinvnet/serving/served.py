"""What is served, as its clients see it, and its queries and results as tensors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, TypeAlias

import numpy as np

from codedinvnet.common.confidence import confidences
from codedinvnet.models.base import DATATYPES, Scores, Signature, TensorSpec, scores_tensor
from codedinvnet.scheduler.group import FILLER
from codedinvnet.serving.workers.pool import (
    OUTPUT,
    Computer,
    Result,
    Task,
    WorkerFailed,
    zeros,
)

if TYPE_CHECKING:
    from torch import Tensor

    from codedinvnet.codes.base import Scheme
    from codedinvnet.protection import tasks

OUTCOME = "outcome"
IMAGES, PROBABILITIES, LABEL = "images", "probabilities", "label"


@dataclass(frozen=True)
class OwnModel:
    """A user's model, untouched: direct answers are its outputs, bit for bit.

    Its inputs of BYTES may be text, as an ONNX file's are, or bytes of any kind.
    """

    name: str
    signature: Signature
    texts: bool = False

    image_shape = None

    @property
    def kind(self) -> str:
        """What the model's scores are."""
        return "logits" if self.signature.scores is None else self.signature.scores.kind

    @property
    def decoded(self) -> tuple[str, ...]:
        """The output that has the scores; () if unknown."""
        scores = self.signature.scores
        return () if scores is None else (scores.output,)

    def datatypes(self, tensor: TensorSpec) -> tuple[str, ...]:
        """Return the datatypes that an input may have in a request: the model's own."""
        return (tensor.datatype,)

    def incompatibility(self, tensor: TensorSpec, values: np.ndarray) -> str:
        """Return what is wrong with an input's values, or ""; only texts are looked at."""
        if self.texts and tensor.datatype == "BYTES":
            for i, value in enumerate(values.flat):
                try:
                    value.decode()
                except UnicodeDecodeError:
                    return f"element {i} must be text in UTF-8, as the model's strings are"
        return ""

    def joined(self, rows: Sequence[np.ndarray]) -> np.ndarray:
        """Return an input of several queries, each (1, *shape), as one batch."""
        return np.concatenate(rows)

    def answer(self, scores: Tensor) -> list[Mapping[str, np.ndarray]]:
        """Return for each row of scores (B, classes) the outputs `decoded`, in batches of one."""
        tensor = scores_tensor(self.signature)
        rows = scores.cpu().numpy().astype(DATATYPES[tensor.datatype])
        return [{tensor.name: row[None]} for row in rows]

    def sure(self, scores: Tensor) -> np.ndarray:
        """Return how sure each row of scores (B, classes) is, (B,)."""
        return sure(scores, self.kind)

    def agree(self, found: Tensor, direct: Tensor) -> bool:
        """Return whether an approximate answer (1, classes) agrees with a direct one."""
        return same_class(found, direct)


@dataclass(frozen=True, kw_only=True)
class ProtectedModel(OwnModel):
    """A user's model whose late answers a backup gives: an output, and how sure it is.

    Attributes:
        output: of the model, which is protected.
        task: what it means.
    """

    output: TensorSpec
    task: tasks.Task

    @property
    def decoded(self) -> tuple[str, ...]:
        return (self.output.name,)

    def answer(self, scores: Tensor) -> list[Mapping[str, np.ndarray]]:
        """Return for each row of a backup's outputs (B, size + 1) the output, in batches of one."""
        rows = scores[:, :-1].cpu().numpy().astype(DATATYPES[self.output.datatype])
        return [{self.output.name: row.reshape(1, *self.output.shape)} for row in rows]

    def sure(self, scores: Tensor) -> np.ndarray:
        return np.asarray(scores[:, -1].float().cpu().numpy())

    def agree(self, found: Tensor, direct: Tensor) -> bool:
        return bool(self.task.agree(found[:, :-1].numpy(), direct.numpy())[0])


@dataclass(frozen=True)
class Classifier:
    """A bundle: images go in, probabilities and a label come out, by a head of ours.

    `dataset` is the image set that it was trained on; "" if unknown.
    """

    name: str
    image_shape: tuple[int, int, int]
    classes: tuple[str, ...]
    dataset: str = ""

    decoded = (PROBABILITIES, LABEL)
    kind = "logits"

    @cached_property
    def signature(self) -> Signature:
        """Images in bytes; as floats in 0..1 they are taken as well."""
        return Signature(
            inputs=(TensorSpec(IMAGES, "UINT8", self.image_shape),),
            outputs=(
                TensorSpec(PROBABILITIES, "FP32", (len(self.classes),)),
                TensorSpec(LABEL, "INT64", ()),
            ),
            scores=Scores(PROBABILITIES, "probabilities"),
            platform="codedinvnet_pytorch",
        )

    def datatypes(self, tensor: TensorSpec) -> tuple[str, ...]:
        """Return those of images."""
        return ("UINT8", "FP32")

    def incompatibility(self, tensor: TensorSpec, values: np.ndarray) -> str:
        """Refuse floats that are no brightness."""
        if values.dtype == np.float32 and not bool(((values >= 0) & (values <= 1)).all()):
            return "FP32 values must lie in 0..1, without NaN"
        return ""

    def joined(self, rows: Sequence[np.ndarray]) -> np.ndarray:
        """Return the rows one behind the other: as floats, if some are."""
        if len({row.dtype for row in rows}) > 1:
            rows = [r.astype(np.float32) / 255 if r.dtype == np.uint8 else r for r in rows]
        return np.concatenate(rows)

    def answer(self, scores: Tensor) -> list[Mapping[str, np.ndarray]]:
        """Return `classified` by rows."""
        found = classified(scores).items()
        return [{name: rows[i : i + 1] for name, rows in found} for i in range(len(scores))]

    def sure(self, scores: Tensor) -> np.ndarray:
        """Return how sure each row of logits (B, classes) is, (B,)."""
        return sure(scores, self.kind)

    def agree(self, found: Tensor, direct: Tensor) -> bool:
        """Return whether an approximate answer's logits (1, classes) agree with direct ones."""
        return same_class(found, direct)


def sure(scores: Tensor, kind: str) -> np.ndarray:
    """Return the highest probability of each row of scores (B, classes), (B,)."""
    return confidences(scores.float().cpu().numpy(), kind)


def same_class(found: Tensor, direct: Tensor) -> bool:
    """Return whether two rows of scores (1, classes) are highest for the same class."""
    return int(found.argmax(1)) == int(direct.argmax(1))


def classified(scores: Tensor) -> dict[str, np.ndarray]:
    """Return what a `Classifier` answers to logits (B, classes): softmax, and its largest class."""
    rows = np.asarray(scores.float().softmax(1).cpu().numpy())
    return {PROBABILITIES: rows, LABEL: rows.argmax(1).astype(np.int64)}


Served: TypeAlias = OwnModel | Classifier
"""A served model, as its clients see it."""


Payload = Mapping[str, np.ndarray]
"""A query, name -> (1, *shape); the dispatcher does not look inside."""
Layout = Mapping[str, tuple[tuple[int, ...], np.dtype[np.generic]]]
"""Name -> shape and type, of a task's outputs."""


class TensorCodec:
    """Makes workers' inputs of queries, and checks their outputs.

    A `filler` is a query of zeros, which fills groups up.
    """

    def __init__(
        self, served: Served, scheme: Scheme | None = None, computer: Computer | None = None
    ) -> None:
        self.served, self.scheme, self._computer = served, scheme, computer
        self.filler = zeros(served.signature.inputs)
        self.filler_output = np.zeros(0, np.float32)
        self._own: Layout = {
            spec.name: ((1, *spec.shape), DATATYPES[spec.datatype])
            for spec in served.signature.outputs
        }
        self._extra: dict[tuple[int, int], Layout] = {}
        """The layouts of extra tasks by their number and how many queries they are of."""

    def learn(self) -> None:
        """Compute each kind of task of fillers, and their head once."""
        import torch

        computer, self._computer = self._computer, None  # which may hold a model
        if self.scheme is None or computer is None:
            return
        rules = self.scheme.rules

        def outputs(task: int, members: int) -> Payload:
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

    def join(self, queries: Sequence[Payload], size: int) -> dict[str, np.ndarray]:
        """Return the inputs of a task of so many queries: these, and fillers."""
        filled = [*queries, *[self.filler] * (size - len(queries))]
        return {name: self.served.joined([query[name] for query in filled]) for name in filled[0]}

    def split(self, task: Task, result: Result, tasks: int) -> list[Result]:
        """Return the results of the data tasks of one call, each of which can be an answer.

        Raises:
            WorkerFailed: if one cannot.
        """
        if tasks == 1:
            return [self._checked(task, result)]
        rows = {len(array) if array.ndim else 0 for array in result.outputs.values()}
        if rows != {tasks}:
            raise WorkerFailed(f"its outputs have {max(rows)} rows, not {tasks}")
        outputs = result.outputs.items()
        return [
            self._checked(
                task, result._replace(outputs={name: array[i : i + 1] for name, array in outputs})
            )
            for i in range(tasks)
        ]

    def mixed(self, outputs: Payload) -> np.ndarray:
        """Return what the code gets of a task's outputs, (n,) float32."""
        found = outputs.get(OUTPUT)
        if found is None:
            found = outputs[self.served.decoded[0]]
        return np.asarray(found, np.float32).reshape(-1)

    def gathered(
        self, attempts: Mapping[int, int], outputs: Mapping[int, Payload]
    ) -> dict[int, np.ndarray]:
        """Return what the code gets of a group, task -> (n,), of attempts and what workers sent."""
        return {
            task: self.filler_output if attempt == FILLER else self.mixed(outputs[attempt])
            for task, attempt in attempts.items()
        }

    def _checked(self, task: Task, result: Result) -> Result:
        wanted = self._own
        if self._extra:
            wanted = self._extra.get((task.number, task.members), wanted)
        found = layout(result.outputs)
        if found != wanted:
            raise WorkerFailed(
                f"its outputs are {shown(found)}, not {shown(wanted)}: it may have another model"
            )
        if self.scheme is not None:
            for name in (OUTPUT, self.served.decoded[0]):
                if name in found and not np.isfinite(result.outputs[name]).all():
                    raise WorkerFailed("its output is not finite")
        return result


def layout(outputs: Payload) -> Layout:
    """Return the names, shapes and types of outputs."""
    return {name: (array.shape, array.dtype) for name, array in outputs.items()}


def shown(outputs: Layout) -> str:
    """Return a layout in words."""
    return ", ".join(f"{name} {dtype} {shape}".strip() for name, (shape, dtype) in outputs.items())
