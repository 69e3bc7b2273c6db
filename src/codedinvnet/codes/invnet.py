"""Coded-InvNet (Dinh & Lee, ICML 2021) as methods: a bundle's own E, the paper's, none, and f⁻¹."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from codedinvnet.codes.base import Scheme
from codedinvnet.codes.mean import MeanCode
from codedinvnet.codes.method import Given, Method
from codedinvnet.codes.rules import SERVED, CodeRules, Parities
from codedinvnet.common.config import (
    NO_INVERSE,
    OBJECTIVE_VERSION,
    EncoderSettings,
    PixelFusionSettings,
)
from codedinvnet.common.errors import UserError
from codedinvnet.models.bundle import BundleInfo
from codedinvnet.models.coded import CodedModel, build_encoder, with_encoder
from codedinvnet.models.network import embedding_of
from codedinvnet.nn.fusion import PixelMean

ORACLE_TOLERANCE = 1e-5
"""Of each block's inverse; the decoded latent's error is k times as large."""


def own_scheme(model: CodedModel, k: int) -> Scheme:
    """Return the scheme of a model's own code, which shares its weights."""
    return Scheme(
        CodedInvNet.name,
        MeanCode(model, k),
        {SERVED: embedding_of(model)},
        model.image_shape,
    )


class CodedInvNet(Method):
    """Coded-InvNet with a bundle's own f, g and E."""

    name = "coded-invnet"
    of_bundle = True
    encodes = True

    def rules(self, k: int, stragglers: int = 1, bundle: BundleInfo | None = None) -> CodeRules:
        return Parities(k, stragglers)  # more than one is imagined

    def check(self, k: int, shape: tuple[int, ...], bundle: BundleInfo | None) -> None:
        if bundle is not None:
            bundle.check_size("k", k)

    def build(self, given: Given) -> Scheme:
        self.check(given.k, given.shape, given.bundle)
        served = {SERVED: embedding_of(given.coded)}
        return self.scheme(MeanCode(given.coded, given.k), given, **served)


class AverageImage(Method):
    """The average image in place of E, around a bundle's f and g: what an encoder must beat.

    It is what the mean of the latents would be for a linear f (Dinh & Lee, section 3.2, motivate E
    by f's not being so). Its parity costs next to nothing to make.
    """

    name = "average-image"
    in_brief = False
    of_bundle = True

    def rules(self, k: int, stragglers: int = 1, bundle: BundleInfo | None = None) -> CodeRules:
        return Parities(k)

    def encoder(self, given: Given) -> nn.Module:
        """Return E."""
        return PixelMean()

    def build(self, given: Given) -> Scheme:
        model = with_encoder(given.coded, self.encoder(given))
        served = {SERVED: embedding_of(model)}
        return self.scheme(MeanCode(model, given.k), given, **served)


class PaperInvNet(AverageImage):
    """Coded-InvNet as it was published, around a bundle's f and g (sections 3.2 and 3.3).

    E was trained for groups of k on the pixels of f⁻¹(mean z), against a discriminator.
    """

    name = "coded-invnet-paper"
    encodes = True
    part, budget = "paper", PixelFusionSettings

    def check(self, k: int, shape: tuple[int, ...], bundle: BundleInfo | None) -> None:
        super().check(k, shape, bundle)
        check_invertible(bundle)

    def versions(self) -> Mapping[str, Any]:
        return {"paper_training": OBJECTIVE_VERSION}

    def made_with(self, given: Given, settings: Any) -> Mapping[str, Any]:
        return {"encoder": settings.encoder.model_dump(mode="json")}

    def untrained(self, given: Given, made_with: Mapping[str, Any]) -> nn.Module:
        settings = EncoderSettings.model_validate(made_with["encoder"])
        return build_encoder(settings, given.coded.input_shape)

    def encoder(self, given: Given) -> nn.Module:
        assert given.part is not None
        return given.part


def check_invertible(bundle: BundleInfo | None) -> None:
    """Refuse a bundle whose f has no inverse."""
    if bundle is not None and bundle.model.network.kind == "plain":
        raise UserError(NO_INVERSE)


class OracleCode(MeanCode):
    """The parity query is f⁻¹(mean z), and g classifies what is decoded."""

    def encode(self, task: int, queries: Tensor) -> Tensor:
        """Return f⁻¹ of the members' mean latent.

        Raises:
            NotConverged: if a mean cannot be inverted.
        """
        latents = self.model.embed(queries.flatten(0, 1)).unflatten(0, queries.shape[:2])
        return self.model.inverse(latents.mean(dim=1), ORACLE_TOLERANCE)


class Oracle(Method):
    """Coded-InvNet with a perfect encoder: the ceiling of the approach (Dinh & Lee, section 3.2).

    To make its parity, all members are embedded and their mean is inverted, which costs far more
    than answering them: no one would serve it. A decoded latent is nearly the true one, so g
    classifies it.
    """

    name = "oracle"
    of_bundle = True
    in_brief = False

    def rules(self, k: int, stragglers: int = 1, bundle: BundleInfo | None = None) -> CodeRules:
        return Parities(k)

    def check(self, k: int, shape: tuple[int, ...], bundle: BundleInfo | None) -> None:
        super().check(k, shape, bundle)
        check_invertible(bundle)

    def build(self, given: Given) -> Scheme:
        self.check(given.k, given.shape, given.bundle)
        served = {SERVED: embedding_of(given.coded)}
        return self.scheme(OracleCode(given.coded, given.k), given, **served)
