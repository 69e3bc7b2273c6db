"""Calibrates a bundle's approximate answers: how often they disagree, by their confidence."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

import numpy as np

from codedinvnet.codes.backup import SmallBackup
from codedinvnet.codes.base import Scheme
from codedinvnet.codes.build import part_beside, scheme_for
from codedinvnet.codes.registry import OURS, find_method
from codedinvnet.common.files import file_digest
from codedinvnet.data import ImageSource
from codedinvnet.models.bundle import Bundle
from codedinvnet.protection.bound import Curve
from codedinvnet.protection.calibration import Calibration, Kind

if TYPE_CHECKING:  # a server reads calibrations, and does without pandas
    from pandas import DataFrame

    from codedinvnet.codes.erase import Queries

BACKUP = SmallBackup.name
SIZES = (2, 4, 10)
"""Group sizes that are calibrated, besides the largest that a bundle serves and those of its small
backups; groups of another size go by the next larger one."""


def schemes(bundle: Bundle, sizes: Iterable[int]) -> Iterator[tuple[str, int, Scheme]]:
    """Yield the method, group size and scheme of all that a bundle is calibrated for."""
    for k in sizes:
        if k in bundle.info.group_sizes:
            yield OURS, k, scheme_for(bundle, k)
        if part_beside(bundle.folder, find_method(BACKUP), k) is not None:
            yield BACKUP, k, scheme_for(bundle, k, BACKUP)


def approximate(
    scheme: Scheme, source: Queries, k: int, *, groupings: int = 1, seed: int = 0
) -> dict[str, DataFrame]:
    """Return the approximate answers of whole random groups, by kind.

    `decoded` is every member's answer as if it alone were missing, `guessed` the one from the extra
    tasks alone; a kind that the code cannot give is left out. Lines are sorted by grouping, group
    and member.
    """
    from codedinvnet.codes.erase import erase, single_losses

    patterns = [*single_losses(k), tuple(range(k))]
    frame = erase(scheme, source, patterns, k=k, groupings=groupings, seed=seed)
    place = ["grouping", "group"]
    whole = frame[frame.groupby(place)["member"].transform("nunique") == k]
    whole = whole.sort_values([*place, "member"], kind="stable", ignore_index=True)
    sizes = whole["lost"].map(len).astype(int)
    kinds = {"decoded": whole[sizes == 1], "guessed": whole[sizes == k]}
    return {name: own for name, own in kinds.items() if len(own) and (own["prediction"] >= 0).all()}


def by_group(frame: DataFrame, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the confidences of answers, and whether they agree with the direct ones, (G, k)."""
    agrees = frame["prediction"] == frame["direct"]
    sure = frame["confidence"].to_numpy(float)
    return sure.reshape(-1, k), agrees.to_numpy().reshape(-1, k)


def calibrate(bundle: Bundle, held_out: ImageSource, seed: int = 0) -> Calibration:
    """Make the curves of a bundle from images that it was not trained on."""
    served, backup = bundle.info.group_sizes, find_method(BACKUP)
    sizes = {k for k in served if part_beside(bundle.folder, backup, k) is not None}
    curves, parts = {}, {}
    for method, k, scheme in schemes(bundle, sorted({*SIZES, max(served), *sizes})):
        for answer, own in approximate(scheme, held_out, k, seed=seed).items():
            curves[Kind(method, k, answer)] = Curve.of(*by_group(own, k))
        if (part := part_beside(bundle.folder, find_method(method), k)) is not None:
            parts[part.stem] = file_digest(part)
    return Calibration(bundle.digest(), len(held_out), curves, parts)
