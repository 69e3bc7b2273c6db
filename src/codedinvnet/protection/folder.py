"""The folder of a protection: its description, its backups as ONNX files, and their scheme."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from pydantic import BaseModel, Field
from torch import Tensor, nn

from codedinvnet.codes.backup import BackupCode, SmallBackup
from codedinvnet.codes.base import Scheme
from codedinvnet.codes.rules import BACKUP, SERVED, AnswersAll, Costs
from codedinvnet.common.config import validated
from codedinvnet.common.errors import UserError
from codedinvnet.common.files import file_digest, read_json, write_atomically
from codedinvnet.models import ModelSource, OpenModel
from codedinvnet.models.base import DATATYPES, TensorSpec
from codedinvnet.models.onnx_file import check_installed, export
from codedinvnet.models.probe import probe_inputs
from codedinvnet.protection.calibration import FILE, Calibration, load_calibration
from codedinvnet.protection.costs import too_slow
from codedinvnet.protection.tasks import Task, task_of

if TYPE_CHECKING:  # a service needs no training
    from codedinvnet.protection.students import Student
    from codedinvnet.protection.teacher import Teacher

FORMAT = 3
DESCRIPTION = "protection.json"
"""Written last: a folder without it holds no protection."""
CONFIDENCE = "backup_confidence"
"""A backup's output that says how sure its answer is; the other one is named as the model's."""
MOST = 100
"""Queries of a group, and workers for its extra tasks, at most."""


class _Protected(BaseModel):
    """What a description says of its model."""

    digest: str
    source: str
    output: str
    task: dict[str, Any]
    weights: str | None = None
    scores: str | None = None
    inputs: tuple[str, ...] = ()


class Row(BaseModel):
    """What a description says of a backup, as far as it is served."""

    method: str = Field(pattern=r"^[\w.+-]+$")
    work: float = Field(gt=0, allow_inf_nan=False)
    """For one query, in the served model's time."""
    k: int = Field(ge=1, le=MOST)
    """Queries of a group."""
    backup_workers: int = Field(ge=1, le=MOST)
    """Workers for a group's extra tasks."""
    digest: str


class Description(BaseModel):
    """What every description has."""

    model: _Protected
    recommended: str | None
    limit: float | None = Field(gt=0, lt=1)
    """On disagreement, that suits the recommended backup."""
    reason: str
    table: list[Row]
    calibration: str = Field(FILE, pattern=r"^calibration[\w-]*\.json$")
    """The file of its curves."""


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
    described = validated(Description, found, f"{path} is damaged")
    try:
        task_of(described.model.task)
    except (TypeError, ValueError) as error:
        raise UserError(f"{path} is damaged: {error}") from error
    return described


def description_digest(folder: Path) -> str:
    """Return a short digest of a protection's description; UserError if there is none."""
    read_description(folder)
    return file_digest(folder / DESCRIPTION)


def protection_calibration(folder: Path) -> Calibration:
    """Read the calibration of a protection."""
    found = read_description(folder)
    again = "`codedinvnet protect` makes it"
    return load_calibration(folder, found.model.digest, again, found.calibration)


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
    same_model(folder, found, model)
    protected_output(found, model)
    row = backup_row(folder, found, method)
    backup = open_backup(folder, row)
    output = found.model.output
    models = {SERVED: Outputs(model, output), BACKUP: Outputs(backup, output, CONFIDENCE)}
    rules = AnswersAll(row.k, BACKUP, cost=Costs(member=row.work), r=row.backup_workers)
    return Scheme(row.method, BackupCode(rules), models, model.signature.inputs[0].shape)


def same_model(folder: Path, found: Description, model: OpenModel) -> None:
    """Raise UserError if a protection is of another model."""
    if found.model.digest != model.source.digest:
        raise UserError(
            f"{folder} protects {found.model.source} with digest {found.model.digest}, but "
            f"{model.source.source} has {model.source.digest}: run codedinvnet protect on it"
        )


def protected_output(found: Description, model: OpenModel) -> TensorSpec:
    """Return the output of a model that is protected.

    Raises:
        UserError: if the model has no such output.
    """
    for spec in model.signature.outputs:
        if spec.name == found.model.output:
            return spec
    raise UserError(f"{model.source.source} has no output {found.model.output!r}")


class Outputs(nn.Module):
    """An output of a model, flattened, and maybe a number behind it: (B, n) float32."""

    def __init__(self, model: OpenModel, output: str, number: str = "") -> None:
        super().__init__()
        self.model, self.output, self.number = model, output, number
        self.inputs = model.signature.inputs

    def forward(self, *queries: Tensor) -> Tensor:
        arrays = {
            spec.name: np.ascontiguousarray(tensor.numpy().astype(DATATYPES[spec.datatype]))
            for spec, tensor in zip(self.inputs, queries, strict=True)
        }
        found = self.model.run(arrays)
        values = torch.from_numpy(found[self.output]).float().flatten(1)
        if not self.number:
            return values
        return torch.cat([values, torch.from_numpy(found[self.number]).float()[:, None]], dim=1)


class Backup(nn.Module):
    """A student as it is served: queries in, the model's output and a confidence out."""

    def __init__(self, student: Student, task: Task, output: TensorSpec) -> None:
        super().__init__()
        self.student, self.task, self.shape = student, task, output.shape
        self.dtype = torch.from_numpy(np.zeros(0, DATATYPES[output.datatype])).dtype

    def forward(self, *inputs: Tensor) -> tuple[Tensor, Tensor]:
        values, sure = self.task.answer(self.student(*inputs).float())
        return values.reshape(-1, *self.shape).to(self.dtype), sure


def open_backup(folder: Path, row: Row) -> OpenModel:
    """Open a backup; UserError if its file was exchanged."""
    backup = backup_source(folder, row.method).open()
    if backup.source.digest != row.digest:
        path = backup.source.source
        raise UserError(f"{path} is not the file that this protection was made with")
    return backup


def backup_row(folder: Path, found: Description, method: str | None) -> Row:
    """Return a backup by name; by default the recommended one."""
    name = found.recommended if method in (None, "", SmallBackup.name) else method
    if name is None:
        raise UserError(f"{folder} recommends no backup: {found.reason}")
    rows = {row.method: row for row in found.table}
    if name not in rows:
        raise UserError(f"{folder} has no backup {name!r}, but {', '.join(rows)}")
    if why := too_slow(rows[name].work):
        raise UserError(f"{folder}: {name} is not served: {why}")
    return rows[name]


def backup_source(folder: Path, name: str) -> ModelSource:
    """Return what opens a backup, on as many threads as PyTorch has: opening a model sets both."""
    path, threads = str(folder / f"{name}.onnx"), torch.get_num_threads()
    return ModelSource(path, threads=threads)


def export_student(folder: Path, name: str, student: Student, teacher: Teacher) -> OpenModel:
    """Write a student as an ONNX file, and open it."""
    check_installed()
    batch = probe_inputs(student.specs)
    examples = dict(zip(batch, student.tensors(batch), strict=True))
    backup = Backup(student, teacher.task, teacher.output).eval()
    content = export(backup, examples, [teacher.output.name, CONFIDENCE])
    source = backup_source(folder, name)
    write_atomically(Path(source.source), content)
    return source.open()
