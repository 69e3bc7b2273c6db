"""The old name of `codedinvnet.evaluation.quantiles`."""

from codedinvnet.evaluation.quantiles import *  # noqa: F403
