from __future__ import annotations

import torch

from codedinvnet.data import sample_images
from codedinvnet.models.bundle import load_bundle
from codedinvnet.models.network import ImageNetwork, classifier_of


def test_a_bundles_classifier_gives_its_direct_logits() -> None:
    bundle = load_bundle("mnist")
    classifier = classifier_of(bundle.model)
    images, labels = sample_images("mnist").batch(torch.arange(50))
    with torch.inference_mode():
        logits = classifier(images)
        torch.testing.assert_close(logits, bundle.model.classify(bundle.embed(images)))
        torch.testing.assert_close(classifier(images / 255), logits)
    assert float((logits.argmax(1) == labels).float().mean()) > 0.9
    assert not classifier.training
    assert next(classifier.parameters()) is next(bundle.model.network.parameters())


def test_images_are_padded_and_scaled() -> None:
    seen = []

    class Watch(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            seen.append(x)
            return x.flatten(1)

    network = ImageNetwork(Watch(), (1, 4, 4), padding=2)
    network(torch.full((1, 1, 4, 4), 255, dtype=torch.uint8))
    assert seen[0].shape == (1, 1, 8, 8)
    assert float(seen[0].sum()) == 16.0
    network(torch.full((1, 1, 8, 8), 0.5))  # as an encoder makes it: padded already
    assert float(seen[1].sum()) == 32.0
