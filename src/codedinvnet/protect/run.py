"""`codedinvnet protect`: ask the model, train parts, measure methods, recommend one."""

from __future__ import annotations

import shutil
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from codedinvnet.codes.base import check_k
from codedinvnet.codes.registry import UNTRAINED
from codedinvnet.errors import UserError
from codedinvnet.files import check_folder, content_digest, read_json, write_atomically, write_json
from codedinvnet.models import ModelSource, OpenModel
from codedinvnet.models.base import DATATYPES, can_be_scores, lacking_scores, scores_tensor
from codedinvnet.models.graph import Unsupported
from codedinvnet.models.probe import finite_rows, kind_of_scores
from codedinvnet.protect import calibration, codes, costs, measure
from codedinvnet.protect.candidates import Measured
from codedinvnet.protect.distil import batch_size
from codedinvnet.protect.folder import (
    CALIBRATION,
    CODE,
    DESCRIPTION,
    EQUAL,
    PARTS,
    PICTURE,
    PLAIN,
    SMALL,
    export_part,
    fingerprint,
    save_calibration,
    tells_nothing,
    write_description,
)
from codedinvnet.protect.frozen import frozen_scores
from codedinvnet.protect.images import layout
from codedinvnet.protect.inputs import read_inputs, split
from codedinvnet.protect.measure import Candidate
from codedinvnet.protect.parts import Trainer
from codedinvnet.protect.picture import draw
from codedinvnet.protect.setting import WORK, ProtectOptions, Setting
from codedinvnet.protect.students import Student, are_words, kind_of
from codedinvnet.protect.teacher import (
    CHANGED,
    STEADY,
    agreement_when,
    check_classes,
    check_scores,
    check_teacher,
    shifted,
    teacher_scores,
    unasked,
)
from codedinvnet.provenance import describe_command, describe_commit, describe_machine
from codedinvnet.training.loop import differing_keys


def protect(options: ProtectOptions) -> dict[str, Any]:
    """Make a protection and return its description.

    Raises:
        UserError: if the model, the inputs or the options are not fit for one.
    """
    began, computed = time.monotonic(), time.process_time()
    check_k(options.k)
    known = (SMALL, CODE, *UNTRAINED)
    for name in options.methods:
        if name not in known:
            raise UserError(f"--methods: {name!r} is not one of {', '.join(known)}")
        if options.methods.count(name) > 1:
            raise UserError(f"--methods: {name} is there twice")
    check_folder(options.out, "--out")
    if (options.out / DESCRIPTION).exists():
        raise UserError(f"--out: {options.out} holds a protection already: name another folder")
    if options.source.kind == "bundle":
        raise UserError(
            f"{options.source.source} is a bundle, which has a code of its own: it needs no "
            "protection, and is served by codedinvnet serve"
        )
    torch.set_num_threads(options.source.threads)  # also beside a server's model
    model = options.source.open()
    if model.signature.scores is None:
        raise UserError(f"{options.source.source}: {lacking_scores(model.signature)}")
    if any(spec.datatype == "BYTES" for spec in model.signature.inputs):
        raise UserError(f"{options.source.source} takes texts, which no protection learns from")
    _check_shift(options, model)
    other = _own_backup(options, model)
    setting = _asked(options, model)
    model, known_by = setting.model, fingerprint(setting.model)
    assert model.signature.scores is not None
    settings = _settings(options, setting)
    candidates: list[Candidate] = []
    notes = [note for note in (setting.repetition, setting.correctness) if note]
    if tells_nothing(known_by):
        notes.append(
            "no gateway takes this protection: by the few inputs that it asks about it would not "
            "know the model, whose scores of them are not finite"
        )
    measured = Measured(options, setting)
    smoothing: dict[str, list[float]] = {}
    exports: list[str] = []
    scores = _with_gradients(options, setting, notes)
    parts = (SMALL in options.methods) + 2 * (scores is not None)
    trainer = Trainer(options, setting, settings, parts, began)
    if SMALL in options.methods:
        student = trainer.student(SMALL, 1 / options.k)
        exported = _exported(options, SMALL, student, exports, notes)
        candidates.append(measured.student(SMALL, student, exported))
    if scores is not None:
        coded = list(measured.coded(trainer.coder(scores)))
        rival = trainer.student(EQUAL, coded[0].cost)
        exported = _exported(options, EQUAL, rival, exports, notes)
        candidates += [*coded, measured.student(EQUAL, rival, exported)]
    if other is not None:
        candidates.append(measured.own(other))
    for name in options.methods:
        if name in UNTRAINED:
            why = codes.refusal(model.signature)
            if why:
                notes.append(f"{name} is left out: {why}")
                continue
            rows, answers = setting.rows.validation, setting.answers
            scheme = codes.tuned(
                name, model, options.k, setting.inputs, rows, answers, options.seed
            )
            if "smoothing" in scheme.chosen:
                smoothing[name] = list(scheme.chosen["smoothing"])
            candidates.append(measured.untrained(scheme))
    notes += trainer.notes
    if not candidates:
        raise UserError("--methods: none of these can protect this model: " + "; ".join(notes))
    frequent = int(np.bincount(setting.answers[setting.rows.train]).argmax())
    advice = measure.recommend(candidates, frequent)
    description = {
        "model": {
            "source": model.source.source,
            "digest": model.source.digest,
            "scores": model.signature.scores.output,
            "kind": setting.kind,
            "macs": setting.macs,
            **known_by,
        },
        "k": options.k,
        "recommended": advice.method,
        "reason": advice.reason,
        "table": [measure.report(candidate) for candidate in candidates],
        "most_frequent": measure.interval(
            setting.answers[setting.rows.test] == frequent, np.arange(len(setting.rows.test))
        ),
        "parts": measured.parts,
        "notes": notes,
        "smoothing": smoothing,
        "exports": exports,
        "settings": {**settings, "minutes": options.minutes},
        "split": {part: len(rows) for part, rows in setting.rows._asdict().items()},
        "seconds": round(time.monotonic() - began, 1),
        "processor_seconds": round(time.process_time() - computed, 1),
        "command": describe_command(),
        "commit": describe_commit(),
        "machine": describe_machine(),
    }
    if other is not None:
        description["own_backup"] = asdict(other.source)
    draw(options.out / PICTURE, candidates)
    save_calibration(options.out / CALIBRATION, candidates)
    calibration.save(options.out, candidates, model.source.digest)
    for name in PARTS.values():
        if (made := options.out / WORK / name).is_file():
            write_atomically(options.out / name, made.read_bytes())
    write_description(options.out, description)
    shutil.rmtree(options.out / WORK)
    return description


def _exported(
    options: ProtectOptions, name: str, student: Student, exports: list[str], notes: list[str]
) -> OpenModel | None:
    """Export a small backup for ONNX Runtime, and take note; None if that cannot be."""
    try:
        found = export_part(options.out, name, student)
    except UserError as error:
        notes.append(f"{name} is computed by PyTorch, which takes longer: {error}")
        return None
    exports.append(name)
    return found


def _own_backup(options: ProtectOptions, model: OpenModel) -> OpenModel | None:
    """Open the user's own smaller model.

    Raises:
        UserError: if it is no file, or its inputs or classes are others.
    """
    if options.backup is None:
        return None
    beside = Path(options.backup)  # a protection is opened from elsewhere
    place = str(beside.absolute()) if beside.exists() else options.backup
    source = ModelSource(place, threads=options.source.threads)
    if source.kind not in PLAIN:
        raise UserError(
            f"--backup: {options.backup} is no file: give .onnx or a bundle, since whoever "
            "opens the protection runs no code that it names"
        )
    if source.kind != "bundle":  # which tells its inputs
        source = replace(source, inputs=options.source.inputs)
    other = source.open()
    mine, its = (
        [(spec.name, spec.datatype, spec.shape) for spec in m.signature.inputs]
        for m in (model, other)
    )
    if mine != its:
        raise UserError(f"--backup: {options.backup} takes {its}, and the model {mine}")
    if other.signature.scores is None:
        assert model.signature.scores is not None
        name = model.signature.scores.output
        if name not in [s.name for s in other.signature.outputs if can_be_scores(s)]:
            raise UserError(
                f"--backup: {options.backup} has no output that is surely class scores, and none "
                f"that is called {name!r} as the model's"
            )
        other = replace(source, scores=name).open()
    sizes = [scores_tensor(m.signature).shape for m in (model, other)]
    if sizes[0] != sizes[1]:
        raise UserError(
            f"--backup: {options.backup} has {sizes[1]} scores, and the model {sizes[0]}"
        )
    return other


def _check_shift(options: ProtectOptions, model: OpenModel) -> None:
    """Refuse a shift by which nothing of an image is left, or that there is no image for."""
    if options.shift is None:
        return
    if kind_of(model.signature.inputs) != "images":
        raise UserError(f"--shift: {model.source.source} does not take one image")
    (spec,) = model.signature.inputs
    height, width = spec.shape[:2] if layout(spec)[1] else spec.shape[1:]
    if not 0 <= options.shift < min(height, width):
        raise UserError(
            f"--shift: images of {height}x{width} pixels are shifted by 0 to "
            f"{min(height, width) - 1}, not by {options.shift}"
        )


def _asked(options: ProtectOptions, model: OpenModel) -> Setting:
    """Read the inputs, and ask the model for its scores of them."""
    inputs = read_inputs(options.inputs, model.signature, options.how, options.labels)
    count = len(inputs)
    inputs = inputs.distinct()
    if len(inputs) < count:
        print(f"{count - len(inputs)} of {count} inputs are repetitions: left out", file=sys.stderr)
    rows = split(len(inputs), options.seed)
    if options.k > len(rows.test):
        raise UserError(f"--k {options.k}: of {len(inputs)} inputs {len(rows.test)} are for tests")
    assert model.signature.scores is not None
    output = content_digest(model.signature.scores.output.encode())
    asked = options.out / WORK / f"asked-{model.source.digest}-{output}-{inputs.digest()}"
    left = unasked(asked, len(inputs))
    seconds = check_teacher(model, inputs) * left
    if seconds > 60 * options.minutes:
        raise UserError(
            f"--minutes: the model needs about {seconds / 60:.1f} minutes for {left} inputs "
            "alone: give more minutes, or fewer inputs"
        )
    scores = teacher_scores(model, inputs, asked)
    check_scores(scores)
    model = _with_kind(options, model, scores)
    told = model.signature.scores
    if options.source.scores is None and told is not None and told.kind == "logits":
        check_classes(scores, told.output)
    macs = costs.model_macs(model, inputs.batch(np.arange(1)))
    return Setting(model, inputs, rows, scores, macs, asked, count - len(inputs))


def _with_kind(options: ProtectOptions, model: OpenModel, scores: np.ndarray) -> OpenModel:
    """Return the model with the kind of its scores of the inputs, if the probe's are not finite."""
    spec = scores_tensor(model.signature)
    known = options.source.scores not in (None, spec.name)  # the user told it
    if known or len(finite_rows(np.array(fingerprint(model)["probe"]))):
        return model
    kind = kind_of_scores(scores.astype(DATATYPES[spec.datatype]))
    return replace(model.source, scores=f"{spec.name}:{kind}").open()


def _settings(options: ProtectOptions, setting: Setting) -> dict[str, Any]:
    """Return what the protection depends on; refuse an unfinished one that depends on other things.

    Other minutes count for what is not planned yet: an epoch may have had no time.

    Raises:
        UserError: naming the differences.
    """
    specs, scores = setting.model.signature.inputs, setting.model.signature.scores
    assert scores is not None
    kind = kind_of(specs)
    if kind == "tokens" and not are_words(setting.inputs.arrays):
        kind = "vectors"
    shift = options.shift
    if shift is None:
        height = specs[0].shape[0 if layout(specs[0])[1] else 1] if kind == "images" else 0
        shift = height // 8 if height >= 16 else 0
        if shift and {SMALL, CODE} & set(options.methods):
            rows = setting.spread(CHANGED)
            model, inputs = setting.model, setting.inputs
            kept = agreement_when(shifted(model, shift), model, inputs, rows, setting.answers)
            shift = shift if kept >= STEADY else 0
    settings = {
        "model": setting.model.source.digest,
        "scores": f"{scores.output}:{scores.kind}",
        "inputs": setting.inputs.digest(),
        "k": options.k,
        "seed": options.seed,
        "kind": kind,
        "flip": options.flip and kind == "images",
        "shift": shift if kind == "images" else 0,
    }
    path = options.out / WORK / "settings.json"
    if path.is_file():
        changed = differing_keys(read_json(path), settings)
        if changed:
            raise UserError(
                f"--out: {options.out} holds an unfinished protection with other settings "
                f"({', '.join(changed)}): name another folder, or delete {options.out / WORK}"
            )
    write_json(path, settings)
    return settings


def _with_gradients(
    options: ProtectOptions, setting: Setting, notes: list[str]
) -> Callable[[Tensor], Tensor] | None:
    """Return the model's scores with gradients if a code is asked for; note why it cannot be."""
    if CODE not in options.methods:
        return None
    why, scores = codes.refusal(setting.model.signature), None
    if not why and setting.macs is None:
        why = "nobody can count the model's multiply-adds, which its encoder's cost is set by"
    batch = batch_size(len(setting.rows.train))
    most = min(batch, len(setting.rows.validation))
    if not why and options.k > most:
        why = f"it learns with groups of at most {most} from so many inputs, and --k is {options.k}"
    if not why:
        groups = setting.rows.train[: batch // 2]  # of two at least
        try:
            scores = frozen_scores(setting.model, setting.inputs.batch(groups))
        except Unsupported as error:
            why = f"it learns through the model, and {error}"
    if why:
        notes.append(f"{CODE} is left out: {why}")
    return scores
