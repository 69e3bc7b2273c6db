"""What tests of the service share: a bundle and images for it."""

from __future__ import annotations

import numpy as np
import pytest

from codedinvnet.codes.base import Scheme
from codedinvnet.codes.build import scheme_for
from codedinvnet.data import sample_images
from codedinvnet.models.bundle import Bundle, load_bundle


@pytest.fixture(scope="session")
def mnist() -> Bundle:
    return load_bundle("mnist")


@pytest.fixture(scope="session")
def images() -> np.ndarray:
    return sample_images("mnist").images.numpy()


@pytest.fixture(scope="session")
def method(mnist: Bundle) -> Scheme:
    """The bundle's own code, four queries to a group."""
    return scheme_for(mnist, 4)
