"""The interface of a model: what it takes, what it returns, and how a batch is run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np

from codedinvnet.common.errors import UserError
from codedinvnet.net.protocol.tensors import DATATYPE_OF as DATATYPE_OF
from codedinvnet.net.protocol.tensors import DATATYPES as DATATYPES
from codedinvnet.net.protocol.tensors import TensorSpec as TensorSpec

FLOATING = ("FP16", "FP32", "FP64")


@dataclass(frozen=True)
class Scores:
    """Where a classifier's answer is.

    Attributes:
        output: the name of the output (B, classes).
        kind: whether its values are logits, or probabilities, which sum to 1.
    """

    output: str
    kind: Literal["logits", "probabilities"]


@dataclass(frozen=True)
class Signature:
    """What is read from a model.

    Attributes:
        inputs: the inputs, in the model's order.
        outputs: the outputs, in the model's order.
        max_batch: queries that it takes at once; None: any number.
        scores: where the class scores are; None if the model is no classifier, or it is not known.
        platform: as the protocol's metadata has it, such as "onnxruntime_onnx".
    """

    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    max_batch: int | None = None
    scores: Scores | None = None
    platform: str = ""


class Model(Protocol):
    """What answers a query."""

    @property
    def signature(self) -> Signature:
        """The model's inputs and outputs."""

    def run(self, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Compute a batch.

        Args:
            inputs: name -> (B, *shape), of every input of the signature.

        Returns:
            name -> (B, *shape), of every output of the signature.
        """


def can_be_scores(spec: TensorSpec) -> bool:
    """Tell whether an output can be class scores: floats, of two classes or more."""
    return spec.datatype in FLOATING and len(spec.shape) == 1 and spec.shape[0] > 1


def scores_tensor(signature: Signature) -> TensorSpec:
    """Return the output that has the class scores."""
    if signature.scores is None:
        if names := [spec.name for spec in signature.outputs if can_be_scores(spec)]:
            raise UserError(f"name the output with the class scores: --scores {' or '.join(names)}")
        for spec in signature.outputs:
            if len(spec.shape) > 1 and set(spec.shape[1:]) == {1}:
                raise UserError(
                    f"output {spec.name!r} has the shape {spec.shape} for a query: add a flatten, "
                    f"so that it becomes ({spec.shape[0]},)"
                )
        raise UserError(
            "no output is class scores, floats (B, classes) of two classes or more: regressions "
            "and embeddings are not supported yet, use policy hedge; with one column of a sigmoid "
            "return concat(1 - p, p)"
        )
    output = signature.scores.output
    return next(spec for spec in signature.outputs if spec.name == output)


def mixed_tensor(signature: Signature) -> TensorSpec:
    """Return the input that a code mixes."""
    if len(signature.inputs) != 1 or signature.inputs[0].datatype not in FLOATING:
        inputs = ", ".join(f"{spec.name!r} ({spec.datatype})" for spec in signature.inputs)
        raise UserError(f"a code mixes queries of one floating input, and the model takes {inputs}")
    return signature.inputs[0]


def parse_input(text: str) -> TensorSpec:
    """Read an input as a user writes it, NAME:DATATYPE:SHAPE, such as `x:FP32:3x32x32`."""
    name, datatype, shape = [*text.rsplit(":", 2), "", ""][:3]
    if not name or datatype not in DATATYPES:
        raise UserError(
            f"input {text!r} is not NAME:DATATYPE:SHAPE, such as images:FP32:3x32x32, with a "
            f"datatype of {', '.join(DATATYPES)}"
        )
    sizes = shape.split("x") if shape else []
    if not all(size.isdecimal() and int(size) > 0 for size in sizes):
        raise UserError(f"input {text!r}: {shape!r} is no shape of one query, such as 3x32x32")
    return TensorSpec(name, datatype, tuple(int(size) for size in sizes))


def check_told(told: Sequence[TensorSpec], names: Sequence[str], where: str) -> None:
    """Refuse inputs that a user told of and the model does not have."""
    for spec in told:
        if spec.name not in names:
            raise UserError(
                f"inputs: {where} has no input {spec.name!r}: its inputs are {', '.join(names)}"
            )
