"""`codedinvnet calibrate` of a protection: thresholds by newer inputs, without training."""

from __future__ import annotations

import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from codedinvnet.common.errors import UserError
from codedinvnet.common.files import check_folder, read_json, write_json
from codedinvnet.common.provenance import describe_command, describe_commit, describe_machine
from codedinvnet.models import ModelSource, OpenModel
from codedinvnet.protection.bound import fewest
from codedinvnet.protection.costs import Interval
from codedinvnet.protection.folder import (
    DESCRIPTION,
    Description,
    open_backup,
    protected_output,
    read_description,
    same_model,
)
from codedinvnet.protection.inputs import FEWEST, Inputs, Split, read_inputs
from codedinvnet.protection.measure import LIMITS
from codedinvnet.protection.run import calibration_of, described, measured
from codedinvnet.protection.tasks import task_of
from codedinvnet.protection.teacher import Teacher, finite_answers


def renew(
    folder: Path, inputs: Path, *, model: str = "", preprocess: str = "", seed: int = 0
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Renew the thresholds of a protection, and its table; return its description before and after.

    One half of the inputs calibrates, and the other half fills the table. The protection stays as
    it was until all is known; then its description, which names its calibration, is replaced.

    Args:
        folder: the protection.
        inputs: unlabelled queries, with which no backup was trained.
        model: what opens the protected model; "": what did when it was protected.
        preprocess: makes a query of a Pillow image; "": what did so then.
        seed: of the halves.

    Raises:
        UserError: if the protection, the model or the inputs do not allow it.
    """
    found = read_description(folder)
    before = read_json(folder / DESCRIPTION)
    check_folder(folder, "calibrate")
    opened = _opened(folder, found, model)
    queries = read_inputs(
        inputs, opened.signature, preprocess or before["settings"].get("preprocess", "")
    ).distinct()
    if queries.digest == before["settings"]["inputs"]:
        raise UserError(
            f"--inputs: the backups of {folder} were trained with these: give inputs that are newer"
        )
    rows = _halves(queries, found.limit or LIMITS[-1], seed)
    output, task = protected_output(found, opened), task_of(found.model.task)
    with tempfile.TemporaryDirectory() as scratch:
        teacher = Teacher(
            opened, output, task, queries, rows, np.empty((0, task.size)), 0.0, Path(scratch)
        )
        teacher = replace(teacher, outputs=finite_answers(teacher.run, queries, Path(scratch)))
    backups = []
    for row, old in zip(found.table, before["table"], strict=True):
        times = {
            name: Interval(*old[key]) for name, key in (("backup", "ms"), ("model", "model_ms"))
        }
        note = old.get("note", "").removeprefix(f"{row.method}: ")
        backups.append(measured(row.method, open_backup(folder, row), times, teacher, note))
    calibration = calibration_of(teacher, backups, before["k"])
    after = {
        **before,
        **described(teacher, backups, before["k"]),
        "calibration": calibration.save_anew(folder),
        "split": before["split"] | {part: len(rows.test) for part in ("calibration", "test")},
        "renewed": {
            "command": describe_command(),
            "commit": describe_commit(),
            "machine": describe_machine(),
        },
    }
    write_json(folder / DESCRIPTION, after)
    if after["calibration"] != found.calibration:
        (folder / found.calibration).unlink(missing_ok=True)
    return before, after


def _opened(folder: Path, found: Description, model: str) -> OpenModel:
    told = found.model
    source = ModelSource(
        model or told.source,
        told.weights,
        told.scores,
        told.inputs,
        threads=torch.get_num_threads(),
    )
    try:
        opened = source.open()
    except UserError as error:
        raise UserError(f"{error}: name the protected model by --model") from error
    same_model(folder, found, opened)
    return opened


def _halves(inputs: Inputs, limit: float, seed: int) -> Split:
    """Return rows to calibrate and to test with; UserError if they are too few for a limit."""
    count, needed = len(inputs), max(FEWEST, 2 * fewest(limit))
    if count < needed:
        raise UserError(
            f"--inputs: found {count} different inputs, and a limit of {100 * limit:g} % needs at "
            f"least {needed}: half of them set the thresholds, and the others test these"
        )
    order = np.random.default_rng(seed).permutation(count)
    calibration, test = np.sort(order[: count // 2]), np.sort(order[count // 2 : count // 2 * 2])
    return Split(calibration, np.empty(0, np.intp), calibration, test)
