"""Networks as workers run them: images as they are stored in, one tensor out."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

from codedinvnet.models.base import DATATYPES, Model, scores_tensor
from codedinvnet.models.coded import CodedModel, padded_shape, prepare


class ImageNetwork(nn.Module):
    """A network from padded pixels to one tensor, with the images' scaling and padding.

    Args:
        network: maps (B, C, H + 2·padding, W + 2·padding) to one tensor (B, ...).
        shape: (C, H, W) of an image as it is stored.
        padding: zero pixels added on every side.
    """

    def __init__(self, network: nn.Module, shape: tuple[int, int, int], padding: int = 0) -> None:
        super().__init__()
        self.network, self.padding = network, padding
        self.input_shape = padded_shape(shape, padding)

    def forward(self, images: Tensor) -> Tensor:
        """Map images (B, C, H, W), uint8 or floats (queries of a code may leave 0..1).

        Images of the padded size are taken as they are: an encoder makes such.
        """
        padded = images.shape[1:] == self.input_shape
        x = prepare(images, 0 if padded else self.padding)
        found: Tensor = self.network(x.to(next(self.network.parameters(), x).dtype))
        return found


def classifier_of(model: CodedModel) -> ImageNetwork:
    """Return g(f(x)) of a coded model; it shares the model's weights."""
    return _images_to(nn.Sequential(model.network, model.head), model)


def embedding_of(model: CodedModel) -> ImageNetwork:
    """Return f(x) of a coded model; it shares the model's weights."""
    return _images_to(model.network, model)


def _images_to(network: nn.Module, model: CodedModel) -> ImageNetwork:
    return ImageNetwork(network, model.image_shape, model.padding).train(model.training)


class ScoresOf(nn.Module):
    """A user's own model as codes see it: queries in, class scores out.

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
