"""The folder of a protection: its description, its backups as ONNX files, and their scheme."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch
from pydantic import BaseModel, Field

from codedinvnet.codes.backup import BackupCode, SmallBackup
from codedinvnet.codes.base import Scheme
from codedinvnet.codes.rules import BACKUP, SERVED, AnswersAll, Costs
from codedinvnet.common.config import validated
from codedinvnet.common.errors import UserError
from codedinvnet.common.files import file_digest, read_json, write_atomically
from codedinvnet.models import ModelSource, OpenModel
from codedinvnet.models.network import ScoresOf
from codedinvnet.models.onnx_file import check_installed, export
from codedinvnet.models.probe import probe_inputs

if TYPE_CHECKING:  # a service needs no training
    from codedinvnet.protect.students import Student

FORMAT = 2
DESCRIPTION = "protection.json"
"""Written last: a folder without it holds no protection."""
MOST = 100
"""Queries of a group, and workers for its extra tasks, at most."""


class _Protected(BaseModel):
    """What a description says of its model."""

    digest: str
    source: str
    scores: str


class Row(BaseModel):
    """What a description says of a backup, as far as it is served."""

    method: str = Field(pattern=r"^[\w.+-]+$")
    work: float = Field(gt=0, allow_inf_nan=False)
    """For one query, in the served model's work."""
    k: int = Field(ge=1, le=MOST)
    """Queries of a group."""
    backup_workers: int = Field(ge=1, le=MOST)
    """Workers for a group's extra tasks."""
    digest: str


class Description(BaseModel):
    """What every description has."""

    model: _Protected
    recommended: str | None
    reason: str
    table: list[Row]


def read_description(folder: Path, digest: str = "") -> Description:
    """Return what a protection is, if it has the digest that the front end has seen ("": any).

    Raises:
        UserError: if the folder holds none, a damaged one, or another one.
    """
    path = folder / DESCRIPTION
    if not path.is_file():
        raise UserError(f"{folder} holds no protection: it has no {DESCRIPTION}")
    if digest and digest != file_digest(path):
        raise UserError(f"{folder} changed since the service started: restart the service")
    found = read_json(path, "the protection")
    if not isinstance(found, dict) or found.get("format_version") != FORMAT:
        raise UserError(f"{path} is of another release: run codedinvnet protect again")
    return validated(Description, found, f"{path} is damaged")


def description_digest(folder: Path) -> str:
    """Return a short digest of a protection's description; UserError if there is none."""
    read_description(folder)
    return file_digest(folder / DESCRIPTION)


def load_protection(
    folder: str | Path, model: OpenModel, method: str | None = None, digest: str = ""
) -> Scheme:
    """Return the scheme that protects a model.

    Args:
        folder: the folder that `codedinvnet protect` wrote.
        model: the served model.
        method: one of its backups; None, "" or "small-backup": the recommended one.
        digest: what `description_digest` found where the service began; "": any will do.

    Raises:
        UserError: if the protection is another model's, is damaged, or recommends nothing.
    """
    folder = Path(folder)
    found = read_description(folder, digest)
    if found.model.digest != model.source.digest:
        raise UserError(
            f"{folder} protects {found.model.source} with digest {found.model.digest}, but "
            f"{model.source.source} has {model.source.digest}: run codedinvnet protect on it"
        )
    scores, wanted = model.signature.scores, found.model.scores
    if scores is None or scores.output != wanted:
        raise UserError(f"{folder} protects the scores {wanted!r}: --scores {wanted}")
    row = _row_of(folder, found, method)
    backup = backup_source(folder, row.method).open()
    if backup.source.digest != row.digest:
        path = backup.source.source
        raise UserError(f"{path} is not the file that this protection was made with")
    models = {SERVED: ScoresOf(model), BACKUP: ScoresOf(backup, scores.kind)}
    rules = AnswersAll(row.k, BACKUP, cost=Costs(member=row.work), r=row.backup_workers)
    return Scheme(row.method, BackupCode(rules), models, model.signature.inputs[0].shape)


def _row_of(folder: Path, found: Description, method: str | None) -> Row:
    """Return a backup by name; by default the recommended one."""
    name = found.recommended if method in (None, "", SmallBackup.name) else method
    if name is None:
        raise UserError(f"{folder} recommends no backup: {found.reason}")
    rows = {row.method: row for row in found.table}
    if name not in rows:
        raise UserError(f"{folder} has no backup {name!r}, but {', '.join(rows)}")
    if rows[name].work >= 1:
        raise UserError(
            f"{folder}: {name} costs {rows[name].work:.2f} of the model for each query: hedging "
            "with the model itself does better (policy hedge)"
        )
    return rows[name]


def backup_source(folder: Path, name: str) -> ModelSource:
    """Return what opens a backup, on as many threads as PyTorch has: opening a model sets both."""
    path, threads = str(folder / f"{name}.onnx"), torch.get_num_threads()
    return ModelSource(path, scores="logits:logits", threads=threads)


def export_student(folder: Path, name: str, student: Student) -> OpenModel:
    """Write a student as an ONNX file, and open it."""
    check_installed()
    batch = probe_inputs(student.specs)
    examples = dict(zip(batch, student.tensors(batch), strict=True))
    content = export(student, examples, ["logits"])
    source = backup_source(folder, name)
    write_atomically(Path(source.source), content)
    return source.open()
