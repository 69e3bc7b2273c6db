"""What makes answers of workers' outputs, if anything does."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

from codedinvnet.serving.decoding import Answerer, Decoding, Wiring
from codedinvnet.serving.outputs import Outputs
from codedinvnet.serving.served import Served

if TYPE_CHECKING:
    from codedinvnet.codes.base import Scheme


def answering(
    scheme: Scheme | Answerer | None, served: Served
) -> tuple[Outputs, Callable[[Wiring], Decoding] | None]:
    """Return what knows workers' outputs, and what makes answers of them, if anything does."""
    if scheme is None:
        return Outputs(served), None
    if isinstance(scheme, Answerer):
        return scheme.reads(served), scheme.queue
    from codedinvnet.serving.decoder import Decoder  # which needs PyTorch

    return Outputs(served, scheme), partial(Decoder, scheme, served)
