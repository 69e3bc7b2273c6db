"""What tests of the faces share."""

from __future__ import annotations

import numpy as np
import pytest


@pytest.fixture(scope="session")
def images(images: np.ndarray) -> np.ndarray:
    return images[:16]
