"""What is served, as its clients see it: which tensors go in, and how answers are made."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, TypeAlias

import numpy as np

from codedinvnet.models.base import DATATYPES, Scores, Signature, TensorSpec, scores_tensor

if TYPE_CHECKING:
    from torch import Tensor

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
        """Return the softmax of logits, and its largest class."""
        rows = np.asarray(scores.float().softmax(1).cpu().numpy())
        labels = rows.argmax(1).astype(np.int64)
        return [
            {PROBABILITIES: rows[i : i + 1], LABEL: labels[i : i + 1]} for i in range(len(rows))
        ]


Served: TypeAlias = OwnModel | Classifier
"""A served model, as its clients see it."""
