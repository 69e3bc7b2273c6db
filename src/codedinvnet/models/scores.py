"""A user's own model as codes see it: queries in, class scores out."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

from codedinvnet.models.base import DATATYPES, Model, scores_tensor


class ScoresOf(nn.Module):
    """A model's scores of its inputs.

    Args:
        model: a classifier.

    Raises:
        UserError: if it is not known where its scores are.
    """

    def __init__(self, model: Model) -> None:
        super().__init__()
        self.model, self.inputs = model, model.signature.inputs
        self.output = scores_tensor(model.signature).name

    def forward(self, *queries: Tensor) -> Tensor:
        """Map queries (B, *shape), of each input in the model's order, to scores (B, classes).

        They are float32, whatever type the model has them in. Workers hand them on so, too.
        """
        arrays = {
            spec.name: np.ascontiguousarray(tensor.numpy().astype(DATATYPES[spec.datatype]))
            for spec, tensor in zip(self.inputs, queries, strict=True)
        }
        return torch.from_numpy(self.model.run(arrays)[self.output]).float()
