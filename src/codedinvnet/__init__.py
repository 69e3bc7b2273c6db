"""Coded-InvNet: prediction serving that survives slow and dead workers (Dinh & Lee, ICML 2021).

A bundle is a trained model with everything that coding needs::

    import codedinvnet

    bundle = codedinvnet.load_bundle("mnist")
    images = codedinvnet.load_images("mnist", "test").batch(torch.arange(4))[0]  # (4, 1, 28, 28)
    latents = bundle.embed(images)  # what the data workers send, (4, 64, 4, 4)
    parity = bundle.encode(images[None])  # what the parity worker sends for one group of four
    lost = bundle.decode(parity, latents[None, 1:], missing=0)  # class probabilities, (1, 10)
    again = bundle.invert(latents)  # the images, (4, 1, 28, 28)
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from codedinvnet.common.errors import UserError

if TYPE_CHECKING:
    from codedinvnet.codes.base import Code, Scheme, ScoresCode
    from codedinvnet.codes.build import scheme_for
    from codedinvnet.codes.erase import erase
    from codedinvnet.codes.method import Method
    from codedinvnet.codes.registry import find_method
    from codedinvnet.common.config import PartSettings, RecoveryFusionSettings, TrainSettings
    from codedinvnet.data.load import load_images, sample_images
    from codedinvnet.data.sources import ImageSet
    from codedinvnet.evaluation.accuracy import Evaluation, evaluate
    from codedinvnet.models.bundle import Bundle, load_bundle
    from codedinvnet.models.coded import CodedModel, decode_missing
    from codedinvnet.models.source import OpenModel, open_model
    from codedinvnet.nn.fusion import FusionEncoder, LeanFusion, PixelMean, UNetFusion
    from codedinvnet.nn.head import Head
    from codedinvnet.nn.iresnet import IResNet
    from codedinvnet.nn.irevnet import IRevNet
    from codedinvnet.nn.resnet import PlainNetwork
    from codedinvnet.nn.transform import InvertibleTransform, NotConverged
    from codedinvnet.protection.in_process import Protection, open_protection, protect
    from codedinvnet.training.fit import fit

__all__ = [
    "Bundle",
    "Code",
    "CodedModel",
    "Evaluation",
    "FusionEncoder",
    "Head",
    "IResNet",
    "IRevNet",
    "ImageSet",
    "InvertibleTransform",
    "LeanFusion",
    "Method",
    "NotConverged",
    "OpenModel",
    "PartSettings",
    "PixelMean",
    "PlainNetwork",
    "Protection",
    "RecoveryFusionSettings",
    "Scheme",
    "ScoresCode",
    "TrainSettings",
    "UNetFusion",
    "UserError",
    "decode_missing",
    "erase",
    "evaluate",
    "find_method",
    "fit",
    "load_bundle",
    "load_images",
    "open_model",
    "open_protection",
    "protect",
    "sample_images",
    "scheme_for",
]

# These load PyTorch, which takes seconds: the command line's help does without.
_HOMES = {
    "codes.base": ("Code", "Scheme", "ScoresCode"),
    "codes.build": ("scheme_for",),
    "codes.erase": ("erase",),
    "codes.method": ("Method",),
    "codes.registry": ("find_method",),
    "common.config": ("PartSettings", "RecoveryFusionSettings", "TrainSettings"),
    "data.load": ("load_images", "sample_images"),
    "data.sources": ("ImageSet",),
    "evaluation.accuracy": ("Evaluation", "evaluate"),
    "models.bundle": ("Bundle", "load_bundle"),
    "models.coded": ("CodedModel", "decode_missing"),
    "models.source": ("OpenModel", "open_model"),
    "nn.fusion": ("FusionEncoder", "LeanFusion", "PixelMean", "UNetFusion"),
    "nn.head": ("Head",),
    "nn.iresnet": ("IResNet",),
    "nn.irevnet": ("IRevNet",),
    "nn.resnet": ("PlainNetwork",),
    "nn.transform": ("InvertibleTransform", "NotConverged"),
    "protection.in_process": ("Protection", "open_protection", "protect"),
    "training.fit": ("fit",),
}


if not TYPE_CHECKING:  # or any name would pass the type checkers

    def __getattr__(name: str) -> Any:
        """Import a public name where it is first asked for (PEP 562)."""
        for home, names in _HOMES.items():
            if name in names:
                return getattr(import_module(f"{__name__}.{home}"), name)
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    """List the public names, loaded or not."""
    return sorted({*globals(), *__all__})
