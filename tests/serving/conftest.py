"""What tests of the service share: a bundle and images for it."""

from __future__ import annotations

import numpy as np
import pytest

from codedinvnet.data import sample_images
from codedinvnet.models.bundle import Bundle, load_bundle


@pytest.fixture(scope="session")
def mnist() -> Bundle:
    return load_bundle("mnist")


@pytest.fixture(scope="session")
def images() -> np.ndarray:
    return sample_images("mnist").images.numpy()
