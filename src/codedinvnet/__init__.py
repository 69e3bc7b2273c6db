"""Coded-InvNet: prediction serving that survives slow and dead workers (Dinh & Lee, ICML 2021)."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from codedinvnet.errors import UserError

if TYPE_CHECKING:
    from codedinvnet.codes.base import Scheme
    from codedinvnet.codes.build import scheme_for
    from codedinvnet.evaluation.accuracy import Evaluation, evaluate
    from codedinvnet.models.bundle import Bundle, load_bundle
    from codedinvnet.models.coded import CodedModel, Parity, decode_missing
    from codedinvnet.nn.transform import InvertibleTransform, NotConverged

__all__ = [
    "Bundle",
    "CodedModel",
    "Evaluation",
    "InvertibleTransform",
    "NotConverged",
    "Parity",
    "Scheme",
    "UserError",
    "decode_missing",
    "evaluate",
    "load_bundle",
    "scheme_for",
]

# These load PyTorch, which takes seconds: the command line's help does without.
_HOMES = {
    "models.bundle": ("Bundle", "load_bundle"),
    "codes.base": ("Scheme",),
    "codes.build": ("scheme_for",),
    "evaluation.accuracy": ("Evaluation", "evaluate"),
    "models.coded": ("CodedModel", "Parity", "decode_missing"),
    "nn.transform": ("InvertibleTransform", "NotConverged"),
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
