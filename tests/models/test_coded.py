from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from codedinvnet.common.config import NetworkSettings
from codedinvnet.common.errors import UserError
from codedinvnet.models.coded import build_network, decode_missing, invertible, prepare
from codedinvnet.nn.lipschitz import constrain_exactly, constrained_layers

SMALL: dict[str, Any] = {"blocks": (1, 1), "strides": (1, 2), "hidden": (8, 8)}


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def without(tensor: Tensor, member: int) -> Tensor:
    return torch.cat([tensor[:, :member], tensor[:, member + 1 :]], dim=1)


@pytest.mark.parametrize("shape", [(2, 1, 3, 4), (2, 5, 3, 3, 4)])
def test_prepare_scales_bytes_and_pads_with_zeros(shape: tuple[int, ...]) -> None:
    images = torch.randint(0, 256, shape, dtype=torch.uint8)
    images.view(-1)[:2] = torch.tensor([0, 255])
    x = prepare(images, 2)
    assert x.dtype == torch.float32
    assert x.shape == (*shape[:-2], 7, 8)
    inner = x[..., 2:-2, 2:-2]
    torch.testing.assert_close(inner, images / 255)
    assert float(inner.min()) == 0.0
    assert float(inner.max()) == 1.0
    assert float(x.sum()) == pytest.approx(float(inner.sum()))


@settings(max_examples=60, deadline=None)
@given(size=st.integers(2, 10), seed=st.integers(0, 2**31), data=st.data())
def test_decoding_is_exact_for_an_exact_parity(size: int, seed: int, data: st.DataObject) -> None:
    z = noise(3, size, 2, 4, seed=seed)
    erased = data.draw(st.integers(0, size - 1), label="erased")
    others = without(z, erased)
    decoded = decode_missing(z.mean(1), others)
    torch.testing.assert_close(decoded, z[:, erased], rtol=0.0, atol=1e-13)
    order = torch.tensor(data.draw(st.permutations(range(size - 1)), label="order"))
    shuffled = decode_missing(z.mean(1), others[:, order])
    torch.testing.assert_close(shuffled, z[:, erased], rtol=0.0, atol=1e-13)


@pytest.mark.parametrize("kind", ["iresnet", "irevnet"])
@pytest.mark.parametrize("size", [2, 3, 5])
def test_the_inverse_of_the_mean_latent_is_a_perfect_parity_image(kind: str, size: int) -> None:
    torch.manual_seed(0)
    network = invertible(build_network(NetworkSettings(**{**SMALL, "kind": kind}), (1, 8, 8)))
    network.double().eval()
    with torch.no_grad():
        for layer in constrained_layers(network):
            layer.weight.mul_(10.0)
        constrain_exactly(network)
        x = noise(3, size, 1, 8, 8).sigmoid()
        z = network(x.flatten(0, 1)).unflatten(0, (3, size))
        image = network.inverse(z.mean(1), tolerance=1e-12, max_iterations=500)
        assert not torch.allclose(image, x.mean(1), atol=1e-3)
        parity = network(image)
        for erased in range(size):
            decoded = decode_missing(parity, without(z, erased))
            torch.testing.assert_close(decoded, z[:, erased], rtol=0.0, atol=1e-9)
            found = network.inverse(decoded, tolerance=1e-12, max_iterations=500)
            torch.testing.assert_close(found, x[:, erased], rtol=0.0, atol=1e-8)


@pytest.mark.parametrize(
    ("change", "shape"),
    [
        ({}, (1, 7, 8)),
        ({"initial_squeeze": 3}, (1, 8, 8)),
        ({"kind": "irevnet", "initial_squeeze": 1}, (3, 8, 8)),
        ({"kind": "plain"}, (1, 10, 10)),
    ],
)
def test_a_network_that_does_not_fit_is_the_users_error(
    change: dict[str, Any], shape: tuple[int, int, int]
) -> None:
    with pytest.raises(UserError, match=f"do not fit {'x'.join(map(str, shape))} inputs"):
        build_network(NetworkSettings(**{**SMALL, **change}), shape)
