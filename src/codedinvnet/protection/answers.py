"""A protection in process: the answers of its backup, and which of them to release."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from codedinvnet.common.errors import UserError
from codedinvnet.models import OpenModel
from codedinvnet.protection.bound import Curve
from codedinvnet.protection.calibration import DECODED, protection_calibration
from codedinvnet.protection.folder import CONFIDENCE, backup_row, open_backup, read_description


class Answered(NamedTuple):
    """Approximate answers to a batch.

    Attributes:
        values: of the protected output, (B, *shape).
        released: whether each may be released, (B,).
        agreement: the probability that each agrees with the model's, (B,).
    """

    values: np.ndarray
    released: np.ndarray
    agreement: np.ndarray


@dataclass(frozen=True, eq=False)
class Protection:
    """A backup of a protection, in this process.

    Attributes:
        backup: an ONNX file that was opened.
        output: the protected one.
        curve: how often answers of each confidence agree.
        limit: on disagreement; None releases everything.
    """

    backup: OpenModel
    output: str
    curve: Curve
    limit: float | None

    def answer(self, inputs: Mapping[str, np.ndarray]) -> Answered:
        """Answer a batch, given by the model's inputs."""
        found = self.backup.run(inputs)
        sure = found[CONFIDENCE]
        least = -np.inf if self.limit is None else self.curve.threshold(self.limit)
        return Answered(found[self.output], sure >= least, self.curve.probability(sure))


def open_protection(
    folder: str | Path, method: str | None = None, limit: float | None = None
) -> Protection:
    """Open a backup of the folder that `codedinvnet protect` wrote.

    Args:
        folder: where it is.
        method: a backup; None: the recommended one.
        limit: on disagreement; None: the suggested one, which only the recommended backup has.

    Raises:
        UserError: if there is no such backup, or it is damaged.
    """
    folder = Path(folder)
    described = read_description(folder)
    row = backup_row(folder, described, method)
    curve = protection_calibration(folder).curve(row.method, row.k, DECODED)
    if curve is None:
        raise UserError(f"{folder} has no calibration of {row.method}: run codedinvnet protect")
    suggested = described.limit if row.method == described.recommended else None
    backup = open_backup(folder, row)
    return Protection(backup, described.model.output, curve, limit or suggested)
