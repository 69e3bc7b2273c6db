"""The folder of a protection: what is in it, and the scheme that a service makes of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from codedinvnet.checkpoint import load_checkpoint, load_modules, module_tensors, save_checkpoint
from codedinvnet.codes.backup import BackupCode
from codedinvnet.codes.base import Scheme
from codedinvnet.codes.rules import BACKUP, SERVED, AnswersAll, Costs
from codedinvnet.errors import UserError
from codedinvnet.files import file_digest, read_json, write_json
from codedinvnet.models import ModelSource, OpenModel
from codedinvnet.models.scores import ScoresOf
from codedinvnet.protect.codes import UNTRAINED, build
from codedinvnet.protect.frozen import Evidence, FrozenCode, FrozenCoder
from codedinvnet.protect.measure import Candidate
from codedinvnet.protect.students import Student, shape_of

FORMAT = 1
DESCRIPTION = "protection.json"
"""Written last: a folder without it holds no protection."""
WEIGHTS, CALIBRATION, PICTURE = "backup.safetensors", "calibration.safetensors", "coverage.png"
SMALL, OWN, EQUAL, CODE = "small-backup", "own-backup", "equal-backup", "code"
PARTS = {SMALL: WEIGHTS, EQUAL: "equal-backup.safetensors", CODE: "code.safetensors"}
"""The files of what was trained."""
EVIDENCE: Mapping[str, Evidence] = {CODE: "both", "code-scores": "scores", "code-side": "side"}
"""Rows of the code around the frozen model, by what their answers rest on."""


class Answering(nn.Module):
    """A backup whose answers are scores of the served model's kind.

    Args:
        module: maps queries to scores.
        given: what its scores are, "logits" or "probabilities".
        wanted: what the served model's are.
    """

    def __init__(self, module: nn.Module, given: str, wanted: str) -> None:
        super().__init__()
        self.module, self.given, self.wanted = module, given, wanted

    def forward(self, *queries: Tensor) -> Tensor:
        """Map queries (B, *shape), of each input, to scores (B, classes)."""
        scores: Tensor = self.module(*queries)
        if self.given == self.wanted:
            return scores
        return scores.softmax(1) if self.wanted == "probabilities" else scores.clamp_min(1e-7).log()


def save_part(path: Path, part: nn.Module) -> None:
    """Write a small backup or a code, with what it is made of."""
    assert isinstance(part, (Student, FrozenCoder))
    told: dict[str, Any] = {"shape": part.shape.as_json()}
    if isinstance(part, FrozenCoder):
        told["scores"] = part.scores
    save_checkpoint(path, module_tensors({"part": part}), told)


def load_part(path: Path) -> Student | FrozenCoder:
    """Read what `save_part` wrote.

    Raises:
        UserError: if the file is damaged, or another's.
    """
    tensors, header = load_checkpoint(path)
    try:
        shape = shape_of(header["shape"])
        scores = header.get("scores")
        part = shape.build() if scores is None else FrozenCoder(shape, scores)
    except (KeyError, TypeError) as error:
        raise UserError(f"{path} is no part of a protection") from error
    load_modules({"part": part}, tensors, path)
    return part.eval()


def save_calibration(path: Path, candidates: Sequence[Candidate]) -> None:
    """Write every method's confidences and agreements on inputs that nothing was trained on."""
    tensors = {}
    for candidate in candidates:
        for part in ("calibration", "test"):
            answers = getattr(candidate, part)
            prefix = f"{candidate.name}.{part}"
            tensors[f"{prefix}.confidence"] = torch.from_numpy(answers.confidence)
            tensors[f"{prefix}.agrees"] = torch.from_numpy(answers.agrees)
    save_checkpoint(path, tensors, {"methods": [candidate.name for candidate in candidates]})


def write_description(folder: Path, description: Mapping[str, Any]) -> None:
    """Write what a protection is, which makes the folder one."""
    write_json(folder / DESCRIPTION, {"format_version": FORMAT, **description})


def read_description(folder: Path) -> dict[str, Any]:
    """Return what a protection is.

    Raises:
        UserError: if the folder holds none, or one of another release.
    """
    if not (folder / DESCRIPTION).is_file():
        raise UserError(f"{folder} holds no protection: it has no {DESCRIPTION}")
    found = read_json(folder / DESCRIPTION, "the protection")
    if not isinstance(found, dict) or found.get("format_version") != FORMAT:
        raise UserError(f"{folder / DESCRIPTION} is of another release: make the protection anew")
    return found


def description_digest(folder: Path) -> str:
    """Return a short digest of a protection's description.

    Raises:
        UserError: if the folder holds none.
    """
    read_description(folder)
    return file_digest(folder / DESCRIPTION)


def load_protection(
    folder: Path, model: OpenModel, method: str | None = None, digest: str = ""
) -> Scheme:
    """Return the scheme that protects a model.

    Args:
        folder: what `codedinvnet protect` wrote.
        model: the served model.
        method: one of the protection's; None or "": the recommended one.
        digest: what `description_digest` found where the service began; "": any will do.

    Raises:
        UserError: if the protection is another model's, is damaged, or recommends nothing.
    """
    found = read_description(folder)
    if digest and digest != description_digest(folder):
        raise UserError(
            f"{folder} is another protection than the front end has: restart the service"
        )
    own = found["model"]
    if own["digest"] != model.source.digest:
        raise UserError(
            f"{folder} protects {own['source']} with digest {own['digest']}, and "
            f"{model.source.source} has {model.source.digest}: run codedinvnet protect on it"
        )
    scores = model.signature.scores
    if scores is None or scores.output != own["scores"]:
        raise UserError(f"{folder} protects the scores {own['scores']!r}: --scores {own['scores']}")
    name = method or found["recommended"]
    if name is None:
        raise UserError(f"{folder} recommends no method: {found['reason']}")
    rows = {row["method"]: row for row in found["table"]}
    if name not in rows:
        raise UserError(f"{folder} has no method {name!r}, but {', '.join(rows)}")
    row = rows[name]
    work, k, backups = float(row["work"]), int(row["k"]), int(row.get("backup_workers", 1))
    if work >= 1:
        raise UserError(
            f"{folder}: {name} costs {work:.2f} of the model for each query: a copy by the model "
            "itself does better (policy hedge)"
        )
    shape = model.signature.inputs[0].shape
    models: dict[str, nn.Module] = {SERVED: ScoresOf(model)}
    if name in UNTRAINED:
        smoothing = found.get("smoothing", {}).get(name)
        return build(name, model, k, None if smoothing is None else tuple(smoothing))
    if name in EVIDENCE:
        coder = load_part(folder / PARTS[CODE])
        assert isinstance(coder, FrozenCoder)
        return Scheme(name, FrozenCode(coder, k, EVIDENCE[name]), models, shape)
    if name == OWN:
        other = ModelSource(**found["own_backup"]).open()
        assert other.signature.scores is not None
        module: nn.Module = ScoresOf(other)
        given = other.signature.scores.kind
    else:
        module, given = load_part(folder / PARTS[name]), "logits"
    models[BACKUP] = Answering(module, given, scores.kind)
    rules = AnswersAll(k, BACKUP, cost=Costs(member=work), r=backups)
    return Scheme(name, BackupCode(rules), models, shape)
