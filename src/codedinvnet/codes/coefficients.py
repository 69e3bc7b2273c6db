"""The mixtures that several parities of a group stand for, so that any of them decode together.

Parity j of a group of m stands for Σ w_ji z_i, where what its weights lack to 1 falls to the black
image. If s members are missing, s parities determine them
by the s×s matrix of their coefficients, whose inverse says how much the parities' errors grow. So
every square submatrix must be well conditioned, single coefficients among them.

The rows are sines and cosines at m points of the circle, of which any r columns are independent.
They are turned by the best of some random rotations, without which some coefficients would be 0.
"""

from __future__ import annotations

from functools import cache
from itertools import combinations

import numpy as np

ROTATIONS = 300
"""Rotations that are tried; they are the same every time."""


def harmonics(size: int, rows: int) -> np.ndarray:
    """Return sines and cosines, (rows, size), in columns of length 1.

    Their frequencies are whole numbers for an odd number of rows, and odd halves for an even one.
    """
    points = 2 * np.pi * np.arange(size) / size
    waves = [np.full(size, np.sqrt(0.5))] if rows % 2 else []
    for frequency in np.arange(rows // 2) + (1.0 if rows % 2 else 0.5):
        waves += [np.cos(frequency * points), np.sin(frequency * points)]
    found: np.ndarray = np.array(waves) * np.sqrt(2 / rows)
    return found


def evened(matrices: np.ndarray) -> np.ndarray:
    """Scale rows of (..., rows, size) so that their coefficients' sizes sum to 1."""
    found: np.ndarray = matrices / np.abs(matrices).sum(-1, keepdims=True)
    return found


def rotations(rows: int, count: int, random: np.random.Generator) -> np.ndarray:
    """Draw orthogonal matrices, (count, rows, rows)."""
    found: np.ndarray = np.linalg.qr(random.standard_normal((count, rows, rows)))[0]
    return found


def worst_minor(matrices: np.ndarray) -> np.ndarray:
    """Return the smallest singular value of any square submatrix of (N, rows, size), (N,)."""
    rows, size = matrices.shape[-2:]
    worst = np.full(len(matrices), np.inf)
    for count in range(1, min(rows, size) + 1):
        for some in combinations(range(rows), count):
            for columns in combinations(range(size), count):
                part = matrices[:, some][:, :, columns]
                worst = np.minimum(worst, np.linalg.svd(part, compute_uv=False)[:, -1])
    return worst


@cache
def coefficients(size: int, rows: int) -> np.ndarray:
    """Return the coefficients of a group's parities, (rows, size); one parity is the mean."""
    if rows == 1:
        return np.full((1, size), 1 / size)
    turned = rotations(rows, ROTATIONS, np.random.default_rng(0)) @ harmonics(size, rows)
    return evened(turned[worst_minor(turned).argmax()])


def solving(weights: np.ndarray, parities: list[int], missing: list[int]) -> np.ndarray:
    """Return what maps the parities' rests to the missing members, (missing, parities).

    A row's length is how much errors of the parities grow in that member; it is the size of a group
    whose one parity is the mean.
    """
    found: np.ndarray = np.linalg.pinv(weights[np.ix_(parities, missing)])
    return found
