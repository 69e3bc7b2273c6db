"""Coded-InvNet: prediction serving that survives slow and dead workers (Dinh & Lee, ICML 2021)."""

from codedinvnet.bundle import Bundle, load_bundle
from codedinvnet.errors import UserError
from codedinvnet.evaluation import Evaluation, evaluate
from codedinvnet.model import CodedModel, Parity, decode_missing
from codedinvnet.nn.transform import InvertibleTransform, NotConverged

__all__ = [
    "Bundle",
    "CodedModel",
    "Evaluation",
    "InvertibleTransform",
    "NotConverged",
    "Parity",
    "UserError",
    "decode_missing",
    "evaluate",
    "load_bundle",
]
