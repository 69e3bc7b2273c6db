"""The oracle: the exact inverse in place of the fusion encoder."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from torch import Tensor

from codedinvnet.codes.base import Encoded, Scheme
from codedinvnet.codes.mean import MeanCode
from codedinvnet.codes.method import ONE, Given, Method, Tolerance
from codedinvnet.codes.rules import SERVED, CodeRules, Parities
from codedinvnet.models.bundle import BundleInfo
from codedinvnet.models.coded import CodedModel
from codedinvnet.models.network import Network, embedding_of

TOLERANCE = 1e-5
"""Of each block's inverse; the decoded latent's error is k times as large."""


class OracleCode(MeanCode):
    """The parity query is f⁻¹(mean z), and g classifies what is decoded."""

    def __init__(self, model: CodedModel, k: int) -> None:
        super().__init__(model, k, "latent")

    def encode(self, task: int, queries: Tensor) -> Encoded:
        """Return f⁻¹ of the members' mean latent.

        Raises:
            NotConverged: if a mean cannot be inverted.
        """
        latents = self.model.embed(queries.flatten(0, 1)).unflatten(0, queries.shape[:2])
        return Encoded(self.model.network.inverse(latents.mean(dim=1), tolerance=TOLERANCE))

    def networks(self) -> Iterator[Network]:
        """Yield none: f⁻¹ is PyTorch's."""
        yield from ()

    def decoded(
        self, outputs: Mapping[int, Tensor], member: int, sides: Tensor, size: int
    ) -> Tensor:
        """Return logits (B, classes) of the one missing member, by g."""
        return self.direct(self.subtracted(outputs, size))


class Oracle(Method):
    """Coded-InvNet with a perfect encoder: the ceiling of the approach (Dinh & Lee, section 3.2).

    To make its parity, all members are embedded and their mean is inverted, which costs far more
    than answering them: no one would serve it. A decoded latent is nearly the true one, so g
    classifies it.
    """

    name = "oracle"
    rank = 12
    of_bundle = True
    is_bound = True

    def rules(
        self, k: int, tolerance: Tolerance = ONE, bundle: BundleInfo | None = None
    ) -> CodeRules:
        return Parities(k)

    def build(self, given: Given) -> Scheme:
        served = {SERVED: embedding_of(given.coded)}
        return self.scheme(OracleCode(given.coded, given.k), given, **served)
