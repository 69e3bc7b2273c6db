"""Coding methods: how missing predictions are made up for."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from enum import Enum
from typing import NamedTuple

from codedinvnet.classifier import classifier_of
from codedinvnet.methods.approxifer import ApproxIFER, ClosedApproxIFER, RobustApproxIFER
from codedinvnet.methods.base import CodedMethod
from codedinvnet.methods.coded_invnet import AverageImage, CodedInvNet, Evidence, PaperInvNet
from codedinvnet.methods.nercc import ClosedNeRCC, NeRCC
from codedinvnet.methods.oracle import Oracle
from codedinvnet.methods.parm import ConcatParM, LearnedCode, ParM
from codedinvnet.methods.small_backup import SmallBackup
from codedinvnet.methods.systematic import Replication, Uncoded
from codedinvnet.model import CodedModel


class Need(Enum):
    """What a method is made of, beside a number k."""

    MODEL = "f, g, E and g' of a bundle"
    CLASSIFIER = "any classifier"
    PARITY_MODEL = "a classifier, and a parity model trained for it and k"
    LEARNED_CODE = "a classifier, and an encoder and a decoder trained for it and k"
    ENCODER = "f and g of a bundle, and an encoder trained for them and k"
    BACKUP = "a classifier, and a small one distilled from it"


METHODS: Mapping[str, type[CodedMethod]] = {
    "none": Uncoded,
    "replication": Replication,
    "parm": ParM,
    "parm-concat": ConcatParM,
    "parm-learned": LearnedCode,
    "approxifer": ApproxIFER,
    "approxifer-closed": ClosedApproxIFER,
    "approxifer-byzantine": RobustApproxIFER,
    "nercc": NeRCC,
    "nercc-closed": ClosedNeRCC,
    "coded-invnet": CodedInvNet,
    "coded-invnet-paper": PaperInvNet,
    "average-image": AverageImage,
    "small-backup": SmallBackup,
    "oracle": Oracle,
}
"""Every method by its name on the command line."""

NEEDS: Mapping[str, Need] = {
    "none": Need.CLASSIFIER,
    "replication": Need.CLASSIFIER,
    "parm": Need.PARITY_MODEL,
    "parm-concat": Need.PARITY_MODEL,
    "parm-learned": Need.LEARNED_CODE,
    "approxifer": Need.CLASSIFIER,
    "approxifer-closed": Need.CLASSIFIER,
    "approxifer-byzantine": Need.CLASSIFIER,
    "nercc": Need.CLASSIFIER,
    "nercc-closed": Need.CLASSIFIER,
    "coded-invnet": Need.MODEL,
    "coded-invnet-paper": Need.ENCODER,
    "average-image": Need.MODEL,
    "small-backup": Need.BACKUP,
    "oracle": Need.MODEL,
}
"""What each method needs."""


class Tolerance(NamedTuple):
    """How many outputs of a group a code makes up for, where it can be chosen."""

    stragglers: int = 1
    """S, those that may be missing."""
    errors: int = 1
    """E, those that may be wrong, of a code that locates them."""


ONE = Tolerance()

RATIONAL = {kind.name: kind for kind in (ApproxIFER, ClosedApproxIFER)}
"""The rational interpolants that look for no errors."""
REGULARISED = {kind.name: kind for kind in (NeRCC, ClosedNeRCC)}
"""The codes whose regularisers are chosen on validation images."""


def _for_stragglers(
    kind: type[ApproxIFER] | type[NeRCC],
) -> Callable[[CodedModel, int, Tolerance], CodedMethod]:
    return lambda model, k, tolerance: kind(
        classifier_of(model), k, stragglers=tolerance.stragglers
    )


FROM_MODEL: Mapping[str, Callable[[CodedModel, int, Tolerance], CodedMethod]] = {
    "coded-invnet": lambda model, k, _: CodedInvNet(model, k),
    "oracle": lambda model, k, _: Oracle(model, k),
    "average-image": lambda model, k, _: AverageImage(model, k),
    **{name: _for_stragglers(kind) for name, kind in (RATIONAL | REGULARISED).items()},
    "approxifer-byzantine": lambda model, k, tolerance: RobustApproxIFER(
        classifier_of(model), k, **tolerance._asdict()
    ),
}
"""The codes that a bundle's model alone is enough for, made from it, k and a tolerance."""
CHOSEN_STRAGGLERS = (*RATIONAL, RobustApproxIFER.name, *REGULARISED)
CHOSEN_ERRORS = (RobustApproxIFER.name,)
"""The codes whose S or E can be chosen."""

__all__ = [
    "CHOSEN_ERRORS",
    "CHOSEN_STRAGGLERS",
    "FROM_MODEL",
    "METHODS",
    "NEEDS",
    "ONE",
    "RATIONAL",
    "REGULARISED",
    "ApproxIFER",
    "AverageImage",
    "ClosedApproxIFER",
    "ClosedNeRCC",
    "CodedInvNet",
    "CodedMethod",
    "ConcatParM",
    "Evidence",
    "LearnedCode",
    "NeRCC",
    "Need",
    "Oracle",
    "PaperInvNet",
    "ParM",
    "Replication",
    "RobustApproxIFER",
    "SmallBackup",
    "Tolerance",
    "Uncoded",
]
