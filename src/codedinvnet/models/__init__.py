"""Models: what answers a query."""

from codedinvnet.models.source import ModelSource, OpenModel, open_model

__all__ = ["ModelSource", "OpenModel", "open_model"]
