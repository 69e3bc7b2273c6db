"""Reports of benchmarks that are measured in parts, which one JSON file keeps together."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from codedinvnet.errors import UserError
from codedinvnet.files import check_writable, read_json, write_json
from codedinvnet.provenance import describe_commit
from codedinvnet.training.loop import differing_keys

COMPARABLE = ("bundle", "weights", "images", "seed", "quick", "device", "machine", "cores")
"""What parts of one report must have in common."""


def check_mergeable(report: Mapping[str, Any], path: Path) -> None:
    """Refuse to put a report into a file that holds parts of another bundle, seed or machine.

    What the file does not say counts as equal: older versions wrote less.

    Raises:
        UserError: naming the file and what differs, or why nothing can be written to it.
    """
    check_writable(path)
    old = _read_report(path)
    both = [key for key in COMPARABLE if key in old and key in report]
    changed = differing_keys({k: old[k] for k in both}, {k: report[k] for k in both})
    if changed:
        raise UserError(
            f"{path} holds parts that were measured otherwise ({', '.join(changed)}): "
            "write to another file with --out, or move this one away"
        )


def _read_report(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    found = read_json(path)
    if not isinstance(found, dict):
        raise UserError(f"{path} is no report of this benchmark: it is not an object")
    return found


def part_of_report(figures: Mapping[str, Any], began: str) -> dict[str, Any]:
    """Return what a report says of one of its parts.

    Args:
        figures: what was measured.
        began: when.
    """
    return {"commit": describe_commit(), "began": began, "figures": sorted(figures)}


def save(report: Mapping[str, Any], path: Path) -> None:
    """Write a report; parts that were measured before and are not in it stay in the file.

    Of a part that is measured anew nothing stays (its `figures` name what it had).

    Args:
        report: of some parts.
        path: the file.

    Raises:
        UserError: if those were measured otherwise (`check_mergeable`).
    """
    check_mergeable(report, path)
    old = _read_report(path)
    parts = {**old.get("parts", {}), **report["parts"]}
    for part in report["parts"]:
        for figure in old.get("parts", {}).get(part, {}).get("figures", []):
            old.pop(figure, None)
    write_json(path, {**old, **report, "parts": parts})
