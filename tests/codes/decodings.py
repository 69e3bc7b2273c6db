"""What a code of one's own model answers for a group, computed without a server."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import combinations

import numpy as np
import torch

from codedinvnet.codes.method import Tolerance
from codedinvnet.models.base import Model
from codedinvnet.serving.workers.computing import scheme_of
from tests.codes.linear import outputs_of, without


def decodings(model: Model, method: str, group: np.ndarray) -> Iterator[np.ndarray]:
    """Yield the answers for a group, (k, classes), for each set of stragglers that the code bears.

    Args:
        model: a classifier of one input.
        method: as `find_method` takes it.
        group: the k members' inputs, (k, ...).
    """
    k, tolerance = len(group), Tolerance()
    scheme = scheme_of(model, method, k)
    with torch.inference_mode():
        outputs = outputs_of(scheme, torch.from_numpy(group)[None])
        for count in range(tolerance.stragglers + 1):
            for lost in combinations(outputs, count):
                answers = scheme.decode(without(outputs, *lost), k)
                yield torch.cat([answers[i] for i in range(k)]).numpy()


def assert_is_decoded(found: np.ndarray, model: Model, method: str, group: np.ndarray) -> None:
    """Check that a group's answers are what the code makes of some stragglers' absence."""
    apart = [float(np.abs(found - told).max()) for told in decodings(model, method, group)]
    assert min(apart) < 1e-4, apart
