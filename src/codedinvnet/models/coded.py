"""The coded model: network f, head g and fusion encoder E as one module."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from functools import partial
from typing import TypeAlias, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from codedinvnet.common.config import (
    NO_INVERSE,
    EncoderSettings,
    NetworkSettings,
    Section,
    Settings,
)
from codedinvnet.common.devices import first_tensor
from codedinvnet.common.errors import UserError
from codedinvnet.nn.fusion import FusionEncoder, LeanFusion, UNetFusion
from codedinvnet.nn.head import Head
from codedinvnet.nn.iresnet import IResNet
from codedinvnet.nn.irevnet import IRevNet
from codedinvnet.nn.resnet import PlainNetwork
from codedinvnet.nn.transform import InvertibleTransform

Network: TypeAlias = IResNet | IRevNet | PlainNetwork
"""An f; see `NetworkSettings.kind`."""


class ModelSettings(Section):
    """What it takes to build the module again, before its weights are loaded."""

    image_shape: tuple[int, int, int]
    """(C, H, W) of the images as they are stored and sent."""
    padding: int
    classes: tuple[str, ...]
    network: NetworkSettings
    encoder: EncoderSettings


def model_settings(
    settings: Settings, image_shape: tuple[int, int, int], classes: tuple[str, ...]
) -> ModelSettings:
    """Return what the model of a run is built from, for images (C, H, W) of these classes."""
    return ModelSettings(
        image_shape=image_shape,
        padding=settings.data.padding,
        classes=classes,
        network=settings.network,
        encoder=settings.fusion.encoder,
    )


def prepare(images: Tensor, padding: int) -> Tensor:
    """Scale uint8 images (..., C, H, W) to 0..1 (floats stay) and pad them with zeros."""
    x = images if images.is_floating_point() else images.float() / 255.0
    return F.pad(x, (padding,) * 4) if padding else x


def padded_shape(shape: Sequence[int], padding: int) -> tuple[int, int, int]:
    """Return the shape (C, H, W) that images of a shape (C, H, W) have when they are padded."""
    channels, height, width = shape
    return channels, height + 2 * padding, width + 2 * padding


def decode_missing(parity: Tensor, others: Tensor) -> Tensor:
    """Decode the latent of a group's missing member: m·z_p − Σ of the others (paper, eq. 2).

    Args:
        parity: z_p, (B, ...).
        others: latents of the m − 1 members that answered, (B, m − 1, ...), in any order.

    Returns:
        (B, ...); exact if z_p is the mean of all m latents.
    """
    return (others.shape[1] + 1) * parity - others.sum(dim=1)


def shared_error(parity: Tensor, latents: Tensor) -> Tensor:
    """Return m·z_p − Σ z_j, (B, ...): the error of every member that is decoded.

    Args:
        parity: z_p, (B, ...).
        latents: of all m members, (B, m, ...).
    """
    return latents.shape[1] * parity - latents.sum(dim=1)


def build_network(settings: NetworkSettings, input_shape: tuple[int, int, int]) -> Network:
    """Build an untrained network f for inputs (C, H, W)."""
    kinds: dict[str, Callable[..., Network]] = {
        "iresnet": partial(IResNet, coefficient=settings.coefficient),
        "irevnet": IRevNet,
        "plain": PlainNetwork,
    }
    try:
        return kinds[settings.kind](
            input_shape,
            blocks=settings.blocks,
            strides=settings.strides,
            hidden=settings.hidden,
            initial_squeeze=settings.initial_squeeze,
        )
    except ValueError as error:
        size = "x".join(map(str, input_shape))
        raise UserError(f"network settings do not fit {size} inputs: {error}") from error


def invertible(network: nn.Module) -> InvertibleTransform:
    """Return a network that has an inverse.

    Raises:
        UserError: if it has none.
    """
    if not isinstance(network, InvertibleTransform):
        raise UserError(NO_INVERSE)
    return network


def build_head(settings: NetworkSettings, latent_shape: tuple[int, int, int], classes: int) -> Head:
    """Build an untrained head g for latents (C, H, W)."""
    return Head(latent_shape, classes, hidden=settings.head_hidden)


def build_encoder(settings: EncoderSettings, input_shape: tuple[int, int, int]) -> FusionEncoder:
    """Build an untrained fusion encoder E for inputs (C, H, W)."""
    channels, height, width = input_shape
    if settings.kind == "lean":
        if height % 8 or width % 8:
            raise UserError(
                f"the lean encoder needs sides divisible by 8, got {height}x{width}: "
                "change data.padding"
            )
        return LeanFusion(channels, width=settings.width, depth=settings.depth)
    halvings = (height & -height).bit_length() - 1
    if height != width or halvings < 2:
        raise UserError(
            "the U-Net needs square images with a side divisible by 4, "
            f"got {height}x{width}: change data.padding"
        )
    depth = min(halvings, 7)
    return UNetFusion(channels, filters=settings.width, depth=depth)


class CodedModel(nn.Module):
    """f, g and E with the images' padding and scaling.

    Images go in as they are stored: uint8 in 0..255, or floats in 0..1, without padding.

    Args:
        network: f, from padded images (B, C, H, W) to latents; `build_network` has some, and any
            module will do that maps one size of images.
        encoder: E; None: a small one.
        head: g; None: one of a linear layer.
        image_shape: (C, H, W) of the images as they are stored and sent.
        classes: their names, or how many.
        padding: zero pixels added on every side.
    """

    def __init__(
        self,
        network: nn.Module,
        encoder: FusionEncoder | None = None,
        head: nn.Module | None = None,
        *,
        image_shape: Sequence[int],
        classes: Sequence[str] | int,
        padding: int = 0,
    ) -> None:
        super().__init__()
        channels, height, width = image_shape
        self.image_shape = channels, height, width
        self.classes = tuple(map(str, range(classes) if isinstance(classes, int) else classes))
        self.padding, self.input_shape = padding, padded_shape(image_shape, padding)
        self.network = network
        self.latent_shape = latent_shape(network, self.input_shape)
        self.head = Head(self.latent_shape, len(self.classes)) if head is None else head
        self.encoder = LeanFusion(channels) if encoder is None else encoder

    def prepare(self, images: Tensor) -> Tensor:
        """Return images (..., C, H, W) in 0..1, of the weights' type, and padded with zeros."""
        return prepare(images, self.padding).to(first_tensor(self).dtype)

    def embed(self, images: Tensor) -> Tensor:
        """Embed images (B, C, H, W) as latents (B, *latent_shape)."""
        z: Tensor = self.network(self.prepare(images))
        return z

    def inverse(self, latents: Tensor, tolerance: float, max_iterations: int = 200) -> Tensor:
        """Return the padded images (B, C, H', W') of latents (B, *latent_shape).

        Raises:
            UserError: if f has no inverse.
            NotConverged: if it has none there, as where its norm is not bounded.
        """
        return invertible(self.network).inverse(
            latents, tolerance=tolerance, max_iterations=max_iterations
        )

    def classify(self, latents: Tensor) -> Tensor:
        """Map latents (B, *latent_shape) to logits (B, classes) by the head g."""
        logits: Tensor = self.head(latents)
        return logits

    def encode(self, images: Tensor) -> Tensor:
        """Do the parity worker's work for groups of images (B, m, C, H, W): return z_p.

        Returns:
            (B, *latent_shape).
        """
        z: Tensor = self.network(self.fuse(images))
        return z

    def fuse(self, images: Tensor) -> Tensor:
        """Run E alone: return the parity images (B, C, H', W'), padded, in 0..1."""
        parity: Tensor = self.encoder(self.prepare(images))
        return parity


def latent_shape(network: nn.Module, input_shape: tuple[int, int, int]) -> tuple[int, int, int]:
    """Return the shape (C, H, W) of the latents of a network for inputs (C, H, W)."""
    if isinstance(network, Network):
        return network.latent_shape
    parameter, training = first_tensor(network), network.training
    with torch.no_grad():
        x = torch.zeros(1, *input_shape, dtype=parameter.dtype, device=parameter.device)
        latents = network.eval()(x)
    network.train(training)
    if latents.ndim != 4:
        shape = tuple(latents.shape[1:])
        raise UserError(f"a network's latents must have three axes (C, H, W), got {shape}")
    _, channels, height, width = latents.shape
    return channels, height, width


def build_model(settings: ModelSettings) -> CodedModel:
    """Build an untrained model."""
    input_shape = padded_shape(settings.image_shape, settings.padding)
    network = build_network(settings.network, input_shape)
    latents, classes = network.latent_shape, len(settings.classes)
    head = build_head(settings.network, latents, classes)
    encoder = build_encoder(settings.encoder, input_shape)
    return CodedModel(
        network,
        encoder,
        head,
        image_shape=settings.image_shape,
        classes=settings.classes,
        padding=settings.padding,
    )


def with_encoder(model: CodedModel, encoder: nn.Module) -> CodedModel:
    """Return a copy of f and g around another E, which is not copied."""
    found = copy.deepcopy(model)
    found.encoder = cast(FusionEncoder, encoder)
    return found
