"""Options of `serve`, for the tests."""

from __future__ import annotations

from typing import Any

from codedinvnet.serving.config import ServeOptions


def changed(options: ServeOptions, **changes: Any) -> ServeOptions:
    """Return options with others."""
    return options.model_copy(update=changes)
