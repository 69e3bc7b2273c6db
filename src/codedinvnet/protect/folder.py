"""The folder of a protection: its description, its backups as ONNX files, and their scheme."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from pydantic import BaseModel, Field
from torch import Tensor, nn

from codedinvnet.codes.backup import BackupCode, SmallBackup
from codedinvnet.codes.base import Scheme
from codedinvnet.codes.rules import BACKUP, SERVED, AnswersAll, Costs
from codedinvnet.common.config import validated
from codedinvnet.common.engines import ONNX_RUNTIME, check_installed
from codedinvnet.common.errors import UserError
from codedinvnet.common.files import file_digest, read_json, write_atomically, write_json
from codedinvnet.models import ModelSource, OpenModel
from codedinvnet.models.base import Model, Signature, scores_tensor
from codedinvnet.models.probe import differ, probe_inputs
from codedinvnet.models.runtime import any_batch, export
from codedinvnet.models.scores import ScoresOf
from codedinvnet.protect.confidence import LEAST
from codedinvnet.protect.students import Student

FORMAT = 2
DESCRIPTION = "protection.json"
"""Written last: a folder without it holds no protection."""
SMALL = SmallBackup.name
MOST = 100
"""Queries of a group, and workers for its extra tasks, at most."""
CLOSE = 1e-2
"""Scores on another machine may differ by this share of the largest one."""


class _Protected(BaseModel):
    """What a description says of its model."""

    digest: str
    source: str
    scores: str
    kind: Literal["logits", "probabilities"]
    tensors: list[list[Any]]
    probe: list[list[float]]


class _Offered(BaseModel):
    """What a description says of a backup."""

    method: str = Field(pattern=r"^[\w.+-]+$")
    work: float = Field(gt=0, allow_inf_nan=False)
    k: int = Field(ge=1, le=MOST)
    backup_workers: int = Field(ge=1, le=MOST)
    digest: str
    scores: str


class _Described(BaseModel):
    """What every description has."""

    model: _Protected
    recommended: str | None
    reason: str
    table: list[_Offered]


class Row(NamedTuple):
    """A backup of a protection, as it is served."""

    name: str
    work: float
    """For one query, in the served model's work."""
    k: int
    """Queries of a group."""
    backups: int
    """Workers for a group's extra tasks."""


class Answering(nn.Module):
    """A backup whose scores are of the served model's kind.

    Args:
        module: maps queries to scores.
        given: the kind of its scores, "logits" or "probabilities".
        wanted: the kind of the served model's scores.
    """

    def __init__(self, module: nn.Module, given: str, wanted: str) -> None:
        super().__init__()
        self.module, self.given, self.wanted = module, given, wanted

    def forward(self, *queries: Tensor) -> Tensor:
        """Map queries (B, *shape), of each input, to scores (B, classes)."""
        scores: Tensor = self.module(*queries)
        if self.given == self.wanted:
            return scores
        return (
            scores.softmax(1) if self.wanted == "probabilities" else scores.clamp_min(LEAST).log()
        )


def write_description(folder: Path, description: Mapping[str, Any]) -> None:
    """Write what a protection is, which makes the folder one."""
    write_json(folder / DESCRIPTION, {"format_version": FORMAT, **description})


def read_description(folder: Path) -> dict[str, Any]:
    """Return what a protection is.

    Raises:
        UserError: if the folder holds none, one of another release, or a damaged one.
    """
    if not (folder / DESCRIPTION).is_file():
        raise UserError(f"{folder} holds no protection: it has no {DESCRIPTION}")
    found = read_json(folder / DESCRIPTION, "the protection")
    if not isinstance(found, dict) or found.get("format_version") != FORMAT:
        raise UserError(
            f"{folder / DESCRIPTION} is of another release: run codedinvnet protect again"
        )
    validated(_Described, found, f"{folder / DESCRIPTION} is damaged")
    return found


def description_digest(folder: Path) -> str:
    """Return a short digest of a protection's description.

    Raises:
        UserError: if the folder holds none.
    """
    read_description(folder)
    return file_digest(folder / DESCRIPTION)


def checked_description(folder: Path, digest: str) -> dict[str, Any]:
    """Return what a protection is, if it is the one that the front end has ("": any).

    Raises:
        UserError: if it is not.
    """
    if digest and digest != description_digest(folder):
        raise UserError(f"{folder} changed since the service started: restart the service")
    return read_description(folder)


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
    found = checked_description(folder, digest)
    own = found["model"]
    if own["digest"] != model.source.digest:
        raise UserError(
            f"{folder} protects {own['source']} with digest {own['digest']}, but "
            f"{model.source.source} has {model.source.digest}: run codedinvnet protect on it"
        )
    scores = model.signature.scores
    if scores is None or scores.output != own["scores"]:
        raise UserError(f"{folder} protects the scores {own['scores']!r}: --scores {own['scores']}")
    name, work, k, backups = row_of(folder, found, method)
    models = {SERVED: ScoresOf(model), BACKUP: open_backup(folder, found, name, scores.kind)}
    rules = AnswersAll(k, BACKUP, cost=Costs(member=work), r=backups)
    return Scheme(name, BackupCode(rules), models, model.signature.inputs[0].shape)


def row_of(folder: Path, found: Mapping[str, Any], method: str | None) -> Row:
    """Return one of a protection's backups.

    Raises:
        UserError: if there is none of that name, or it costs as much as the model.
    """
    name = found["recommended"] if method in (None, "", SMALL) else method
    if name is None:
        raise UserError(f"{folder} recommends no backup: {found['reason']}")
    rows = {row["method"]: row for row in found["table"]}
    if name not in rows:
        raise UserError(f"{folder} has no backup {name!r}, but {', '.join(rows)}")
    row = rows[name]
    if float(row["work"]) >= 1:
        raise UserError(
            f"{folder}: {name} costs {row['work']:.2f} of the model for each query: hedging with "
            "the model itself does better (policy hedge)"
        )
    return Row(name, float(row["work"]), int(row["k"]), int(row["backup_workers"]))


def open_backup(folder: Path, found: Mapping[str, Any], name: str, kind: str) -> Answering:
    """Open one of a protection's backups.

    Args:
        folder: the protection's folder.
        found: its description.
        name: the backup's.
        kind: the kind that its scores are to have, "logits" or "probabilities".

    Raises:
        UserError: if its file is missing, or another one.
    """
    row = next(row for row in found["table"] if row["method"] == row_of(folder, found, name).name)
    other = backup_source(folder, row["method"], row["scores"]).open()
    if other.source.digest != row["digest"]:
        raise UserError(f"{other.source.source} is not the file that this protection was made with")
    assert other.signature.scores is not None
    return Answering(ScoresOf(other), other.signature.scores.kind, kind)


def backup_source(folder: Path, name: str, scores: str) -> ModelSource:
    """Return what opens a backup, on as many threads as PyTorch has: opening a model sets both."""
    path = str(folder / f"{name}.onnx")
    return ModelSource(path, scores=scores, threads=torch.get_num_threads())


def export_student(folder: Path, name: str, student: Student) -> OpenModel:
    """Write a student as an ONNX file, and open it; a file that is not fit is removed.

    Raises:
        UserError: if it cannot be exported, or ONNX Runtime computes other scores.
    """
    check_installed(ONNX_RUNTIME)
    batch = probe_inputs(student.specs)
    examples = student.tensors(batch)
    content = export(
        student,
        examples,
        input_names=list(batch),
        output_names=["logits"],
        dynamic_shapes=any_batch(len(examples)),
    )
    source = backup_source(folder, name, "logits:logits")
    write_atomically(Path(source.source), content)
    try:
        found = source.open()
        with torch.inference_mode():
            wanted = student(*examples).numpy()
        scores = found.run(batch)["logits"]
        if not np.allclose(scores, wanted, rtol=0, atol=CLOSE * float(np.abs(wanted).max())):
            raise UserError(f"{name}: ONNX Runtime and PyTorch compute different scores")
    except Exception:
        Path(source.source).unlink()
        raise
    return found


def fingerprint(model: Model) -> dict[str, Any]:
    """Return what identifies a model whose file is elsewhere: its tensors, and some scores."""
    signature = model.signature
    scores = model.run(probe_inputs(signature.inputs))[scores_tensor(signature).name]
    return {"tensors": _tensors_of(signature), "probe": scores.astype(np.float64).tolist()}


def _tensors_of(signature: Signature) -> list[Any]:
    specs = (*signature.inputs, scores_tensor(signature))
    return [[spec.name, spec.datatype, list(spec.shape)] for spec in specs]


def check_fingerprint(folder: Path, found: Mapping[str, Any], model: Model, where: str) -> None:
    """Refuse a protection whose model has other tensors or other scores.

    Args:
        folder: the protection's folder.
        found: its description.
        model: the served model.
        where: the name of what is served, for messages.

    Raises:
        UserError: saying what differs.
    """
    own, seen = found["model"], fingerprint(model)
    if seen["tensors"] != own["tensors"]:
        raise UserError(
            f"{folder} protects {own['source']} with the tensors {own['tensors']}, and {where} has "
            f"{seen['tensors']}"
        )
    if not np.isfinite(np.array(own["probe"])).any():
        raise UserError(
            f"{folder}: cannot tell whether {where} is the protected model, because the scores of "
            f"{own['source']} for the probe inputs are not finite"
        )
    if differ(np.array(own["probe"]), np.array(seen["probe"]), CLOSE):
        raise UserError(
            f"{folder} protects {own['source']}, and {where} is another model: its scores of the "
            "same inputs differ"
        )
