"""The folder of a protection: what is in it, and the scheme that a service makes of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from pydantic import BaseModel
from torch import Tensor, nn

from codedinvnet.checkpoint import load_checkpoint, load_modules, module_tensors, save_checkpoint
from codedinvnet.codes.backup import BackupCode, SmallBackup
from codedinvnet.codes.base import Scheme
from codedinvnet.codes.registry import UNTRAINED
from codedinvnet.codes.rules import BACKUP, SERVED, AnswersAll, Costs
from codedinvnet.config import validated
from codedinvnet.engines import ONNX_RUNTIME, check_installed, is_installed
from codedinvnet.errors import UserError
from codedinvnet.files import file_digest, read_json, write_atomically, write_json
from codedinvnet.models import ModelSource, OpenModel
from codedinvnet.models.base import Model, Signature, scores_tensor
from codedinvnet.models.probe import differ, probe_inputs
from codedinvnet.models.runtime import any_batch, export
from codedinvnet.models.scores import ScoresOf
from codedinvnet.protect.codes import build
from codedinvnet.protect.frozen import Evidence, FrozenCode, FrozenCoder
from codedinvnet.protect.measure import Candidate
from codedinvnet.protect.students import Student, shape_of, tensors
from codedinvnet.trust.confidence import LEAST

FORMAT = 1
DESCRIPTION = "protection.json"
"""Written last: a folder without it holds no protection."""
WEIGHTS, CALIBRATION, PICTURE = "backup.safetensors", "calibration.safetensors", "coverage.png"
SMALL, OWN, EQUAL, CODE = SmallBackup.name, "own-backup", "equal-backup", "code"
PARTS = {SMALL: WEIGHTS, EQUAL: "equal-backup.safetensors", CODE: "code.safetensors"}
"""The files of what was trained."""
EXPORTS = {SMALL: "backup.onnx", EQUAL: "equal-backup.onnx"}
"""The small backups as ONNX Runtime computes them, which is faster than PyTorch."""
EVIDENCE: Mapping[str, Evidence] = {CODE: "both", "code-scores": "scores", "code-side": "side"}
"""Rows of the code around the frozen model, by what their answers rest on."""
PLAIN = ("onnx", "bundle")
"""Kinds of models that a description may name: files that run no code of anybody's."""
CLOSE = 1e-2
"""Share of the largest score by which another machine's answers may differ."""


class Answering(nn.Module):
    """A backup whose answers are scores of the served model's kind.

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
    """Write every method's confidences and agreements, by groups, on inputs not trained on."""
    tensors = {}
    for candidate in candidates:
        for part in ("calibration", "test"):
            answers = getattr(candidate, part)
            prefix = f"{candidate.name}.{part}"
            tensors[f"{prefix}.confidence"] = torch.from_numpy(answers.confidence)
            tensors[f"{prefix}.agrees"] = torch.from_numpy(answers.agrees)
            tensors[f"{prefix}.groups"] = torch.from_numpy(answers.groups)
    save_checkpoint(path, tensors, {"methods": [candidate.name for candidate in candidates]})


def write_description(folder: Path, description: Mapping[str, Any]) -> None:
    """Write what a protection is, which makes the folder one."""
    write_json(folder / DESCRIPTION, {"format_version": FORMAT, **description})


class _Protected(BaseModel):
    """What every description says of its model."""

    digest: str
    source: str
    scores: str
    kind: Literal["logits", "probabilities"]
    tensors: list[list[Any]]
    probe: list[list[float]]


class _Offered(BaseModel):
    """What every line of a description's table says."""

    method: str
    work: float
    k: int


class _Described(BaseModel):
    """What every description has; the rest is looked for by who needs it."""

    model: _Protected
    recommended: str | None
    reason: str
    table: list[_Offered]


def read_description(folder: Path) -> dict[str, Any]:
    """Return what a protection is.

    Raises:
        UserError: if the folder holds none, one of another release, or a damaged one.
    """
    if not (folder / DESCRIPTION).is_file():
        raise UserError(f"{folder} holds no protection: it has no {DESCRIPTION}")
    found = read_json(folder / DESCRIPTION, "the protection")
    if not isinstance(found, dict) or found.get("format_version") != FORMAT:
        raise UserError(f"{folder / DESCRIPTION} is of another release: make the protection anew")
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
        raise UserError(
            f"{folder} is another protection than the front end has: restart the service"
        )
    return read_description(folder)


def load_protection(
    folder: str | Path, model: OpenModel, method: str | None = None, digest: str = ""
) -> Scheme:
    """Return the scheme that protects a model.

    Args:
        folder: the folder that `codedinvnet protect` wrote.
        model: the served model.
        method: one of the protection's; None or "": the recommended one.
        digest: what `description_digest` found where the service began; "": any will do.

    Raises:
        UserError: if the protection is another model's, is damaged, or recommends nothing.
    """
    folder = Path(folder)
    found = checked_description(folder, digest)
    own = found["model"]
    if own["digest"] != model.source.digest:
        raise UserError(
            f"{folder} protects {own['source']} with digest {own['digest']}, and "
            f"{model.source.source} has {model.source.digest}: run codedinvnet protect on it"
        )
    scores = model.signature.scores
    if scores is None or scores.output != own["scores"]:
        raise UserError(f"{folder} protects the scores {own['scores']!r}: --scores {own['scores']}")
    return scheme_of(folder, found, model, method)


class Row(NamedTuple):
    """A method of a protection's table, as it is served."""

    name: str
    work: float
    """For a query, in services of the model."""
    k: int
    backups: int
    """Extra tasks of a group."""


def row_of(folder: Path, found: Mapping[str, Any], method: str | None) -> Row:
    """Return a method of a protection's table.

    Raises:
        UserError: if there is no such method, it costs too much to serve with, or it is a model
            that a description may not name.
    """
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
    if name == OWN:
        own_backup(folder, found)
    return Row(name, work, k, backups)


def own_backup(folder: Path, found: Mapping[str, Any]) -> ModelSource:
    """Return what opens the user's own smaller model, which is a file that runs no code.

    Raises:
        UserError: if the description names none, or a factory or a URL.
    """
    try:
        source = ModelSource(**found["own_backup"])
        kind = source.kind
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{folder / DESCRIPTION} names no own backup: make it anew") from error
    if kind not in PLAIN:
        raise UserError(
            f"{folder / DESCRIPTION} names {source.source!r} as its backup, which is not opened, "
            "since a folder may be anybody's: make the protection anew with a file (.onnx)"
        )
    return source


def scheme_of(folder: Path, found: Mapping[str, Any], model: Model, method: str | None) -> Scheme:
    """Return the scheme that a protection of a model makes.

    Args:
        folder: the protection's folder.
        found: its description.
        model: the served model.
        method: one of the protection's; None or "": the recommended one.

    Raises:
        UserError: see `row_of`.
    """
    name, work, k, backups = row_of(folder, found, method)
    if name in UNTRAINED:
        smoothing = found.get("smoothing", {}).get(name)
        return build(name, model, k, None if smoothing is None else tuple(smoothing))
    shape = model.signature.inputs[0].shape
    if name in EVIDENCE:
        coder = load_part(folder / PARTS[CODE])
        assert isinstance(coder, FrozenCoder)
        return Scheme(name, FrozenCode(coder, k, EVIDENCE[name]), {SERVED: ScoresOf(model)}, shape)
    assert model.signature.scores is not None
    backup = open_backup(folder, found, name, model.signature.scores.kind)
    models = {SERVED: ScoresOf(model), BACKUP: backup}
    rules = AnswersAll(k, BACKUP, cost=Costs(member=work), r=backups)
    return Scheme(name, BackupCode(rules), models, shape)


def open_backup(folder: Path, found: Mapping[str, Any], name: str, kind: str) -> Answering:
    """Return a protection's small backup, or the user's own smaller model.

    Args:
        folder: the protection's folder.
        found: its description.
        name: SMALL, EQUAL or OWN.
        kind: the kind that its scores are to have, "logits" or "probabilities".

    Raises:
        UserError: if it cannot be opened, or is a model that a description may not name.
    """
    wanted = ""
    if name == OWN:
        named = own_backup(folder, found)
        source, wanted = replace(named, digest="", threads=torch.get_num_threads()), named.digest
    elif name in found.get("exports", ()) and is_installed(ONNX_RUNTIME):
        source = _exported(folder, name)
    else:
        return Answering(load_part(folder / PARTS[name]), "logits", kind)
    other = source.open()
    if wanted and other.source.digest != wanted:
        raise UserError(
            f"{source.source} is another file than {folder} was made with: put that one back, or "
            "make the protection anew"
        )
    assert other.signature.scores is not None
    return Answering(ScoresOf(other), other.signature.scores.kind, kind)


def _exported(folder: Path, name: str) -> ModelSource:
    """Return what opens an export, on as many threads as PyTorch has: opening a model sets both."""
    path, threads = str(folder / EXPORTS[name]), torch.get_num_threads()
    return ModelSource(path, scores="logits:logits", threads=threads)


def export_part(folder: Path, name: str, student: Student) -> OpenModel:
    """Write a small backup for ONNX Runtime, and open it; nothing is left of one that is not fit.

    Raises:
        UserError: if it cannot be exported, or gives other scores then.
    """
    check_installed(ONNX_RUNTIME)
    batch = probe_inputs(student.shape.inputs)
    examples = tensors(student.shape, batch)
    content = export(
        student,
        examples,
        input_names=list(batch),
        output_names=["logits"],
        dynamic_shapes=any_batch(len(examples)),
    )
    write_atomically(folder / EXPORTS[name], content)
    try:
        found = _exported(folder, name).open()
        with torch.inference_mode():
            wanted = student(*examples).numpy()
        scores = found.run(batch)["logits"]
        if not np.allclose(scores, wanted, rtol=0, atol=CLOSE * float(np.abs(wanted).max())):
            raise UserError("ONNX Runtime gives other scores than PyTorch")
    except Exception:
        (folder / EXPORTS[name]).unlink()
        raise
    return found


def fingerprint(model: Model) -> dict[str, Any]:
    """Return what tells a model from others where its files are not: tensors, and some scores."""
    signature = model.signature
    scores = model.run(probe_inputs(signature.inputs))[scores_tensor(signature).name]
    return {"tensors": tensors_of(signature), "probe": scores.astype(np.float64).tolist()}


def tells_nothing(known_by: Mapping[str, Any]) -> bool:
    """Tell whether a fingerprint has no finite score by which a model is known."""
    return not np.isfinite(np.array(known_by["probe"])).any()


def tensors_of(signature: Signature) -> list[Any]:
    """Return a model's inputs, and the output with its scores, as JSON has them."""
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
    own = found["model"]
    seen = fingerprint(model)
    if seen["tensors"] != own["tensors"]:
        both = f"{own['tensors']}, and {where} has {seen['tensors']}"
        raise UserError(f"{folder} protects {own['source']} with the tensors {both}")
    if tells_nothing(own):
        raise UserError(
            f"{folder}: nothing tells whether {where} is the model that it protects: the scores of "
            f"{own['source']} are not finite for the few inputs that it was asked about"
        )
    if differ(np.array(own["probe"]), np.array(seen["probe"]), CLOSE):
        raise UserError(
            f"{folder} protects {own['source']}, and {where} is another model: its scores of the "
            "same inputs differ"
        )
