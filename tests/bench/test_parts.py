from __future__ import annotations

import torch

from codedinvnet.bench.parts import fusion_targets
from codedinvnet.bundle import Bundle
from codedinvnet.data import ImageSet


def test_the_papers_targets_have_the_mean_latent(bundle: Bundle, held_out: ImageSet) -> None:
    groups = torch.arange(12).view(3, 4)
    data = fusion_targets(bundle.model, held_out, groups)
    assert torch.equal(data.groups, groups)
    assert data.targets.shape == (3, *bundle.model.input_shape)
    mean = bundle.embed(held_out.images[:12]).unflatten(0, (3, 4)).mean(dim=1)
    torch.testing.assert_close(bundle.model.network(data.targets), mean, atol=1e-3, rtol=0)
