"""The curves of approximate answers, stored with a bundle or a protection."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from codedinvnet.codes.build import part_beside
from codedinvnet.codes.registry import find_method
from codedinvnet.common.errors import UserError
from codedinvnet.common.files import content_digest, file_digest, read_json, write_json
from codedinvnet.protection.bound import Curve

FILE = "calibration.json"
"""The file next to a bundle's weights, or in a protection."""
VERSION = 1
COLUMNS = ("thresholds", "released", "disagreed")
DECODED, GUESSED = "decoded", "guessed"
"""Kinds of approximate answers: for one missing member, and from the extra tasks alone."""


class Kind(NamedTuple):
    """What a curve is of."""

    method: str
    k: int
    answer: str


@dataclass(frozen=True)
class Calibration:
    """The curves of a bundle, or a protection.

    Attributes:
        weights: the digest of the bundle's weights, or of the protected model.
        images: how many held-out inputs there were.
        curves: the curves, by method, group size and kind of answer.
        parts: the digests of the files with a bundle's trained parts, by `METHOD-kK`.
    """

    weights: str
    images: int
    curves: Mapping[Kind, Curve]
    parts: Mapping[str, str] = field(default_factory=dict)

    def of_part(self, method: str, k: int, digest: str) -> Calibration:
        """Leave out curves of a method that another trained part than this one for k has made."""
        known = self.parts.get(f"{method}-k{k}") == digest
        curves = {
            kind: curve
            for kind, curve in self.curves.items()
            if kind.method != method or (known and kind.k == k)
        }
        return replace(self, curves=curves)

    def curve(self, method: str, size: int, answer: str = DECODED) -> Curve | None:
        """Return the curve for a group of a size, or of the next larger size; None without one."""
        sizes = [kind.k for kind in self.curves if (kind.method, kind.answer) == (method, answer)]
        k = min((k for k in sizes if k >= size), default=None)
        return None if k is None else self.curves[Kind(method, k, answer)]

    def save(self, path: Path) -> None:
        """Write the file."""
        write_json(path, self._content(), indent=None)

    def save_anew(self, folder: Path) -> str:
        """Write a file that is named by its content, and return its name."""
        content = self._content()
        name = f"calibration-{content_digest(json.dumps(content).encode())}.json"
        write_json(folder / name, content, indent=None)
        return name

    def _content(self) -> dict[str, Any]:
        curves = [
            {
                **kind._asdict(),
                "spread": round(curve.spread, 4),
                **{name: getattr(curve, name).tolist() for name in COLUMNS},
            }
            for kind, curve in self.curves.items()
        ]
        content = {"format_version": VERSION, "weights": self.weights, "images": self.images}
        return {**content, "parts": self.parts, "curves": curves}


def load_calibration(
    folder: Path,
    weights: str,
    again: str = "`codedinvnet calibrate` makes it",
    name: str = FILE,
) -> Calibration:
    """Read the calibration in the folder of a bundle or a protection.

    Raises:
        UserError: if there is none, it is damaged, or it is of other weights; `again` says how to
            make one.
    """
    path = folder / name
    if not path.is_file():
        raise UserError(f"{folder} has no {name}: {again}")
    try:
        raw = read_json(path)
        if raw["format_version"] != VERSION:
            raise ValueError(raw["format_version"])
        curves = {}
        for row in raw["curves"]:
            thresholds, released, disagreed = (np.asarray(row[name]) for name in COLUMNS)
            kind = Kind(row["method"], int(row["k"]), row["answer"])
            curves[kind] = Curve(thresholds, released, disagreed, float(row["spread"]))
        found = Calibration(str(raw["weights"]), int(raw["images"]), curves, dict(raw["parts"]))
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path} is damaged: {again} again") from error
    if found.weights != weights:
        raise UserError(f"{path} is of other weights: {again} again")
    return found


def calibration_of(
    folder: Path, weights: str, method: str, k: int, part: Path | None = None
) -> Calibration:
    """Read a bundle's calibration, without curves that another trained part of the method made.

    `part` is the file with the method's trained part for groups of up to k; by default it is the
    one next to the weights, if there is one.
    """
    stored, found = load_calibration(folder, weights), find_method(method)
    if not found.part:
        return stored
    part = part or part_beside(folder, found, k)
    return stored.of_part(found.name, k, "" if part is None else file_digest(part))
