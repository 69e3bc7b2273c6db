"""A user's own model as codes see it: queries in, class scores out."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

from codedinvnet.errors import UserError
from codedinvnet.models.base import DATATYPES, Model, Signature, TensorSpec

FLOATING = ("FP16", "FP32", "FP64")


class ScoresOf(nn.Module):
    """A model's scores of its inputs.

    Args:
        model: a classifier.

    Raises:
        UserError: if nobody knows where its scores are.
    """

    def __init__(self, model: Model) -> None:
        super().__init__()
        self.model, self.inputs = model, model.signature.inputs
        self.output = scores_tensor(model.signature).name

    def forward(self, *queries: Tensor) -> Tensor:
        """Map queries (B, *shape), of each input in the model's order, to scores (B, classes)."""
        arrays = {
            spec.name: np.ascontiguousarray(tensor.numpy().astype(DATATYPES[spec.datatype]))
            for spec, tensor in zip(self.inputs, queries, strict=True)
        }
        return torch.from_numpy(self.model.run(arrays)[self.output])


def scores_tensor(signature: Signature) -> TensorSpec:
    """Return the output that has the class scores.

    Raises:
        UserError: if nobody knows which.
    """
    if signature.scores is None:
        raise UserError("a code decodes class scores: tell which output has them, --scores NAME")
    output = signature.scores.output
    return next(spec for spec in signature.outputs if spec.name == output)


def mixed_tensor(signature: Signature) -> TensorSpec:
    """Return the input that a code mixes.

    Raises:
        UserError: if there is not one floating input.
    """
    if len(signature.inputs) != 1 or signature.inputs[0].datatype not in FLOATING:
        inputs = ", ".join(f"{spec.name!r} ({spec.datatype})" for spec in signature.inputs)
        raise UserError(f"a code mixes queries of one floating input, and the model takes {inputs}")
    return signature.inputs[0]
