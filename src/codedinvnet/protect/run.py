"""`codedinvnet protect`: ask the model, train a small backup, measure methods, recommend one."""

from __future__ import annotations

import math
import shutil
import sys
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from codedinvnet.codes.base import Scheme, check_k
from codedinvnet.config import PartSettings
from codedinvnet.errors import UserError
from codedinvnet.files import check_folder, read_json, write_json
from codedinvnet.models import ModelSource, OpenModel
from codedinvnet.protect import codes, costs, measure
from codedinvnet.protect.distil import DistilStage, Lesson, plan, student_scores
from codedinvnet.protect.folder import (
    CALIBRATION,
    DESCRIPTION,
    OWN,
    PICTURE,
    SMALL,
    WEIGHTS,
    fingerprint,
    load_student,
    save_calibration,
    save_student,
    write_description,
)
from codedinvnet.protect.images import Preprocessing, layout
from codedinvnet.protect.inputs import Inputs, Split, read_inputs, split
from codedinvnet.protect.measure import Answers, Candidate, answers_of
from codedinvnet.protect.picture import draw
from codedinvnet.protect.students import Shape, Student, kind_of, tensors
from codedinvnet.protect.teacher import (
    BATCH,
    check_scores,
    check_teacher,
    log_probabilities,
    scores_of,
    teacher_scores,
)
from codedinvnet.provenance import describe_command, describe_commit, describe_machine
from codedinvnet.training.loop import LATEST, differing_keys, train_stage

WORK = "work"
"""In the folder of a protection that is not finished: what was asked, and checkpoints."""
MIRRORED_SHARE = 0.25
"""Of the minutes: asking the model for mirrored images may take so much."""


@dataclass(frozen=True)
class ProtectOptions:
    """What `codedinvnet protect` is asked for.

    Attributes:
        source: the served model.
        inputs: see `read_inputs`.
        out: the folder of the protection.
        k: queries in a group.
        minutes: for asking the model and training.
        seed: of the split and the training.
        labels: see `read_inputs`.
        how: what is done to images.
        flip: whether images may be mirrored in training.
        shift: pixels by which images may be shifted in training.
        backup: the user's own smaller model; None: there is none.
        methods: that are measured.
    """

    source: ModelSource
    inputs: Path
    out: Path
    k: int = 10
    minutes: float = 30.0
    seed: int = 0
    labels: Path | None = None
    how: Preprocessing = field(default_factory=Preprocessing)
    flip: bool = True
    shift: int | None = None
    backup: str | None = None
    methods: tuple[str, ...] = (SMALL, *codes.UNTRAINED)


@dataclass(frozen=True)
class Setting:
    """A model with its inputs, and what it said of them.

    Attributes:
        model: the served model.
        inputs: all queries, none of them twice.
        rows: their split.
        scores: the model's, (N, classes).
        macs: the model's multiply-adds for a query; None if they cannot be counted.
        work: folder for what is not finished.
    """

    model: OpenModel
    inputs: Inputs
    rows: Split
    scores: np.ndarray
    macs: int | None
    work: Path

    @property
    def kind(self) -> str:
        """What the scores are."""
        assert self.model.signature.scores is not None
        return self.model.signature.scores.kind

    @property
    def answers(self) -> np.ndarray:
        """The model's answers to all inputs, (N,)."""
        answers: np.ndarray = self.scores.argmax(axis=1)
        return answers


def protect(options: ProtectOptions) -> dict[str, Any]:
    """Make a protection and return its description.

    Raises:
        UserError: if the model, the inputs or the options are not fit for one.
    """
    began = time.monotonic()
    check_k(options.k)
    for name in options.methods:
        if name not in (SMALL, *codes.UNTRAINED):
            raise UserError(
                f"--methods: {name!r} is not one of {SMALL}, {', '.join(codes.UNTRAINED)}"
            )
    check_folder(options.out, "--out")
    if (options.out / DESCRIPTION).exists():
        raise UserError(f"--out: {options.out} holds a protection already: name another folder")
    model = options.source.open()
    if model.signature.scores is None:
        raise UserError(
            f"tell which output of {options.source.source} has the class scores: --scores"
        )
    other = _own_backup(options, model)
    setting = _asked(options, model)
    settings = _settings(options, setting)
    candidates: list[Candidate] = []
    notes: list[str] = []
    parts: dict[str, Any] = {}
    smoothing: dict[str, list[float]] = {}
    if SMALL in options.methods:
        student = _trained(options, setting, settings, began)
        candidates.append(_small(options, setting, student, parts))
    if other is not None:
        candidates.append(_own(options, setting, other, parts))
    for name in options.methods:
        if name in codes.UNTRAINED:
            why = codes.refusal(model.signature)
            if why:
                notes.append(f"{name} is left out: {why}")
                continue
            scheme = codes.tuned(
                name, model, options.k, setting.inputs, setting.rows.validation, setting.answers
            )
            if "smoothing" in scheme.chosen:
                smoothing[name] = list(scheme.chosen["smoothing"])
            candidates.append(_coded(options, setting, scheme, parts))
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
            **fingerprint(model),
        },
        "k": options.k,
        "recommended": advice.method,
        "reason": advice.reason,
        "table": [measure.report(candidate) for candidate in candidates],
        "most_frequent": measure.interval(
            setting.answers[setting.rows.test] == frequent, np.arange(len(setting.rows.test))
        ),
        "parts": parts,
        "notes": notes,
        "smoothing": smoothing,
        "settings": settings,
        "split": {part: len(rows) for part, rows in setting.rows._asdict().items()},
        "seconds": round(time.monotonic() - began, 1),
        "command": describe_command(),
        "commit": describe_commit(),
        "machine": describe_machine(),
    }
    if other is not None:
        description["own_backup"] = asdict(other.source)
    draw(options.out / PICTURE, candidates)
    save_calibration(options.out / CALIBRATION, candidates)
    write_description(options.out, description)
    shutil.rmtree(options.out / WORK)
    return description


def _own_backup(options: ProtectOptions, model: OpenModel) -> OpenModel | None:
    """Open the user's own smaller model.

    Raises:
        UserError: if its inputs or classes are others.
    """
    if options.backup is None:
        return None
    other = ModelSource(options.backup, threads=options.source.threads).open()
    mine, its = (
        [(spec.name, spec.datatype, spec.shape) for spec in m.signature.inputs]
        for m in (model, other)
    )
    if mine != its:
        raise UserError(f"--backup: {options.backup} takes {its}, and the model {mine}")
    if other.signature.scores is None:
        raise UserError(f"--backup: {options.backup} has no output that is surely class scores")
    sizes = [
        next(spec.shape for spec in m.signature.outputs if spec.name == m.signature.scores.output)
        for m in (model, other)
        if m.signature.scores is not None
    ]
    if sizes[0] != sizes[1]:
        raise UserError(
            f"--backup: {options.backup} has {sizes[1]} scores, and the model {sizes[0]}"
        )
    return other


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
    seconds = check_teacher(model, inputs) * len(inputs)
    if seconds > 60 * options.minutes:
        raise UserError(
            f"--minutes: the model needs about {seconds / 60:.1f} minutes for {len(inputs)} inputs "
            "alone: give more minutes, or fewer inputs"
        )
    work = options.out / WORK
    asked = work / f"asked-{model.source.digest}-{inputs.digest()}"
    scores = teacher_scores(model, inputs, asked)
    check_scores(scores)
    macs = costs.model_macs(model, inputs.batch(np.arange(1)))
    return Setting(model, inputs, rows, scores, macs, asked)


def _settings(options: ProtectOptions, setting: Setting) -> dict[str, Any]:
    """Return what the protection depends on; refuse an unfinished one that depends on other things.

    Raises:
        UserError: naming the differences.
    """
    specs = setting.model.signature.inputs
    kind = kind_of(specs)
    shift = options.shift
    if shift is None:
        height = specs[0].shape[0 if layout(specs[0])[1] else 1] if kind == "images" else 0
        shift = height // 8 if height >= 16 else 0
    settings = {
        "model": setting.model.source.digest,
        "inputs": setting.inputs.digest(),
        "k": options.k,
        "minutes": options.minutes,
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


def _trained(
    options: ProtectOptions, setting: Setting, settings: Mapping[str, Any], began: float
) -> Student:
    """Train the small backup, or go on with it."""
    final = options.out / WEIGHTS
    if final.is_file():  # killed while it was measured
        return load_student(final)
    lesson = _lesson(setting, settings, options)
    shape = _shape(options, setting, settings["kind"])
    torch.manual_seed(options.seed)
    student = shape.build()
    sample = setting.inputs.batch(setting.rows.train[:1000])
    student.learn_scale(sample)
    path = options.out / WORK / "plan.json"
    if not path.is_file():
        spare = shape.build()
        spare.learn_scale(sample)
        left = 60 * options.minutes - (time.monotonic() - began)
        write_json(path, {"seconds": left, "part": plan(spare, lesson, left).model_dump()})
    planned = read_json(path)
    part = PartSettings.model_validate(planned["part"])
    stage = DistilStage(student, lesson, part, planned["seconds"])
    train_stage(
        stage,
        options.out / WORK,
        epochs=part.epochs,
        seed=options.seed,
        settings={**settings, "part": part.model_dump(), "shape": shape.as_json()},
        resume=LATEST,
        replan=stage.replan,
    )
    save_student(final, student)
    return student


def _lesson(setting: Setting, settings: Mapping[str, Any], options: ProtectOptions) -> Lesson:
    mirrored = None
    if settings["flip"]:
        (spec,) = setting.model.signature.inputs
        axis = 2 if layout(spec)[1] else 3
        seconds = check_teacher(setting.model, setting.inputs) * len(setting.inputs)
        there = any(setting.work.glob("mirrored-*"))
        if there or seconds < 60 * options.minutes * MIRRORED_SHARE:
            scores = teacher_scores(setting.model, setting.inputs, setting.work, mirrored=axis)
            mirrored = log_probabilities(scores, setting.kind)
    return Lesson(
        setting.inputs,
        setting.rows.train,
        setting.rows.validation,
        log_probabilities(setting.scores, setting.kind),
        mirrored,
        settings["flip"],
        settings["shift"],
    )


def _shape(options: ProtectOptions, setting: Setting, kind: Any) -> Shape:
    """Return the largest student that costs no more than 1/k of the model."""
    path = options.out / WORK / "width.json"
    words = 0
    if kind == "tokens":
        words = 1 + max(int(array.max()) for array in setting.inputs.arrays.values())
    classes, specs = setting.scores.shape[1], setting.model.signature.inputs

    def shape(width: int) -> Shape:
        return Shape(kind, width, classes, specs, words)

    if not path.is_file():
        if setting.macs is not None:
            width = costs.width_by_macs(shape, setting.macs // options.k)
        else:
            one = setting.inputs.batch(np.arange(1))
            (found,) = costs.milliseconds({"": lambda: setting.model.run(one)}).values()
            group = setting.inputs.batch(np.arange(options.k))
            width = costs.width_by_time(shape, group, found.median)
        write_json(path, width)
    return shape(int(read_json(path)))


def _answers(setting: Setting, scores: np.ndarray, rows: np.ndarray, kind: str) -> Answers:
    logs = log_probabilities(scores, kind)
    return answers_of(logs, rows, setting.answers, setting.inputs.labels)


def _small(
    options: ProtectOptions, setting: Setting, student: Student, parts: dict[str, Any]
) -> Candidate:
    macs = costs.student_macs(student)
    group = setting.inputs.batch(np.arange(options.k))
    inputs = tensors(student.shape, group)
    with torch.inference_mode():
        _timed(options, setting, SMALL, lambda: student(*inputs), macs, parts)
    cost, fits, note = _work(options, setting, SMALL, macs, parts)
    calibration, test = (
        _answers(setting, student_scores(student, setting.inputs, rows), rows, "logits")
        for rows in (setting.rows.calibration, setting.rows.test)
    )
    return Candidate(SMALL, cost, calibration, test, fits, note)


def _own(
    options: ProtectOptions, setting: Setting, other: OpenModel, parts: dict[str, Any]
) -> Candidate:
    macs = costs.model_macs(other, setting.inputs.batch(np.arange(1)))
    group = setting.inputs.batch(np.arange(options.k))
    _timed(options, setting, OWN, lambda: other.run(group), macs, parts)
    cost, fits, note = _work(options, setting, OWN, macs, parts)
    assert other.signature.scores is not None
    found = []
    for rows in (setting.rows.calibration, setting.rows.test):
        batches = np.split(rows, range(BATCH, len(rows), BATCH))
        scores = np.concatenate([scores_of(other, setting.inputs.batch(part)) for part in batches])
        found.append(_answers(setting, scores, rows, other.signature.scores.kind))
    calibration, test = found
    return Candidate(OWN, cost, calibration, test, fits, note)


def _coded(
    options: ProtectOptions, setting: Setting, scheme: Scheme, parts: dict[str, Any]
) -> Candidate:
    k = options.k
    (batch,) = setting.inputs.batch(np.arange(k)).values()
    queries = torch.from_numpy(batch)[None]
    classes = setting.scores.shape[1]
    outputs = {task: torch.zeros(1, classes) for task in list(scheme.rules.tasks(k))[1:]}
    calls = {
        f"{scheme.name}: encode a query": lambda: scheme.code.encode(k, queries),
        f"{scheme.name}: decode a group": lambda: scheme.decode(outputs, k),
    }
    parts.update({name: {"ms": found} for name, found in costs.milliseconds(calls).items()})
    found = []
    for number, rows in enumerate((setting.rows.calibration, setting.rows.test)):
        those, scores, groups = codes.decoded(scheme, setting.inputs, rows, options.seed + number)
        logs = log_probabilities(scores, setting.kind)
        found.append(answers_of(logs, those, setting.answers, setting.inputs.labels, groups))
    calibration, test = found
    return Candidate(scheme.name, 1 / k, calibration, test, k)


def _timed(
    options: ProtectOptions,
    setting: Setting,
    name: str,
    call: Any,
    macs: int | None,
    parts: dict[str, Any],
) -> None:
    """Time a backup's answers to a group, and the model's to one query, in turn."""
    one = setting.inputs.batch(np.arange(1))
    label = f"{name}: a group of {options.k}"
    times = costs.milliseconds({"model": lambda: setting.model.run(one), label: call})
    parts.setdefault("the model: a query", {"ms": times["model"], "macs": setting.macs})
    parts[label] = {"ms": times[label], "macs": None if macs is None else macs * options.k}


def _work(
    options: ProtectOptions,
    setting: Setting,
    name: str,
    macs: int | None,
    parts: Mapping[str, Any],
) -> tuple[float, int, str]:
    """Return a backup's work for a query, the k that it is served with, and why that is another."""
    k = options.k
    if macs is not None and setting.macs is not None:
        work = macs / setting.macs
    else:
        group = parts[f"{name}: a group of {k}"]["ms"].median
        work = group / k / parts["the model: a query"]["ms"].median
    if work * k <= 1.001:
        return work, k, ""
    fits = max(1, math.floor(1 / work + 1e-9))
    return (
        work,
        fits,
        f"{name} costs more than 1/{k} of the model: it is served with k = {fits}, since k = {k} "
        f"would take {math.ceil(work * k)} backup workers",
    )
