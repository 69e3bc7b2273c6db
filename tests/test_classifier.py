from __future__ import annotations

import torch

from codedinvnet.data import sample_images
from codedinvnet.models.bundle import load_bundle
from codedinvnet.models.network import classifier_of


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
