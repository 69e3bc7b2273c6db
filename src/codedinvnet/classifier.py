"""A base model as coding methods see it: images as they are stored in, logits out."""

from __future__ import annotations

from torch import Tensor, nn

from codedinvnet.model import CodedModel, prepare


class ImageClassifier(nn.Module):
    """A network from padded pixels to logits, with the images' scaling and padding.

    Args:
        network: maps (B, C, H + 2·padding, W + 2·padding) to logits (B, classes).
        padding: zero pixels added on every side.
    """

    def __init__(self, network: nn.Module, padding: int = 0) -> None:
        super().__init__()
        self.network = network
        self.padding = padding

    def forward(self, images: Tensor) -> Tensor:
        """Map images (B, C, H, W), uint8 or floats (queries of a code may leave 0..1), to logits.

        Returns:
            (B, classes).
        """
        x = prepare(images, self.padding)
        logits: Tensor = self.network(x.to(next(self.network.parameters(), x).dtype))
        return logits


def classifier_of(model: CodedModel) -> ImageClassifier:
    """Return g(f(x)) of a coded model; it shares the model's weights."""
    network = nn.Sequential(model.network, model.head)
    return ImageClassifier(network, model.settings.padding).train(model.training)
