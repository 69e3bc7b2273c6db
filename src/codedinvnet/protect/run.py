"""`codedinvnet protect`: score the inputs, train backups, measure them, and recommend one."""

from __future__ import annotations

import shutil
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from codedinvnet.codes.base import check_k
from codedinvnet.common.errors import UserError
from codedinvnet.common.files import check_folder, read_json, write_json
from codedinvnet.common.provenance import describe_command, describe_commit, describe_machine
from codedinvnet.models import ModelSource, OpenModel
from codedinvnet.models.base import scores_tensor
from codedinvnet.protect import measure
from codedinvnet.protect.bound import Curve
from codedinvnet.protect.calibration import DECODED, FILE, GUESSED, Calibration, Kind
from codedinvnet.protect.confidence import log_probabilities
from codedinvnet.protect.costs import Cost, milliseconds, model_cost, one_thread
from codedinvnet.protect.distil import Lesson
from codedinvnet.protect.folder import (
    DESCRIPTION,
    export_student,
    fingerprint,
    write_description,
)
from codedinvnet.protect.inputs import read_inputs, split
from codedinvnet.protect.ladder import WORKS, Ladder
from codedinvnet.protect.measure import Answers, Candidate
from codedinvnet.protect.students import kind_of
from codedinvnet.protect.teacher import (
    BATCH,
    MIRRORED_SHARE,
    STEADY,
    Teacher,
    ask,
    check_classifier,
    scores_of,
)
from codedinvnet.training.loop import differing_keys

WORK = "work"
"""The folder, in an unfinished protection, of scores and checkpoints."""
MEASURED = 0.05
"""Share of the minutes that is kept for exports and measurements."""


@dataclass(frozen=True)
class ProtectOptions:
    """What `codedinvnet protect` is asked for.

    Attributes:
        source: the served model, on as many threads as training may take; times are measured on
            one.
        inputs: see `read_inputs`.
        out: the folder of the protection.
        k: queries of a group, for policies that send the backup everything.
        minutes: time for scoring and training together.
        work: the only size of backup, as a share of the model's work; None: a ladder of them.
        seed: of the split and the trainings.
        labels: see `read_inputs`.
        preprocess: see `read_inputs`.
        mirror: whether images may be mirrored in training.
    """

    source: ModelSource
    inputs: Path
    out: Path
    k: int = 10
    minutes: float = 30.0
    work: float | None = None
    seed: int = 0
    labels: Path | None = None
    preprocess: str = ""
    mirror: bool = True


def protect(options: ProtectOptions) -> dict[str, Any]:
    """Make a protection and return its description.

    Raises:
        UserError: if the model, the inputs or the options do not allow one.
    """
    began, computed = time.monotonic(), time.process_time()
    check_k(options.k)
    if options.work is not None and not 0 < options.work < 1:
        raise UserError(f"--work: must lie between 0 and 1, got {options.work}")
    check_folder(options.out, "--out")
    if (options.out / DESCRIPTION).exists():
        raise UserError(f"--out: {options.out} already holds a protection: name another folder")
    torch.set_num_threads(options.source.threads)  # a server's model sets none
    model = options.source.open()
    check_classifier(model)
    inputs = read_inputs(options.inputs, model.signature, options.preprocess, options.labels)
    count, inputs = len(inputs), inputs.distinct()
    rows = split(len(inputs), options.seed)
    if options.k > len(rows.test):
        raise UserError(f"--k {options.k}: only {len(rows.test)} inputs are held out for tests")
    teacher = ask(model, inputs, rows, options.out / WORK, options.minutes)
    notes = _notes(teacher, count - len(inputs))
    lesson, settings = _lesson(options, teacher, notes)
    with one_thread():
        single = replace(teacher.model.source, threads=1).open()
        cost = _cost(single, teacher, notes)
    backups = _backups(options, lesson, single, cost, began, notes)
    candidates = [candidate for candidate, _ in backups]
    frequent = int(np.bincount(teacher.answers[rows.train]).argmax())
    advice = measure.recommend(candidates, frequent)
    description = {
        "model": {
            "source": teacher.model.source.source,
            "digest": teacher.model.source.digest,
            "scores": scores_tensor(model.signature).name,
            "kind": teacher.kind,
            "macs": cost.macs,
            "ms": cost.ms,
            **fingerprint(teacher.model),
        },
        "k": options.k,
        "recommended": advice.method,
        "reason": advice.reason,
        "table": [_row(*backup) for backup in backups],
        "most_frequent": measure.interval(teacher.answers[rows.test] == frequent),
        "notes": notes,
        "settings": {**settings, "minutes": options.minutes},
        "split": {part: len(found) for part, found in rows._asdict().items()},
        "seconds": round(time.monotonic() - began, 1),
        "processor_seconds": round(time.process_time() - computed, 1),
        "command": describe_command(),
        "commit": describe_commit(),
        "machine": describe_machine(),
    }
    _calibrate(options.out, teacher, candidates)
    write_description(options.out, description)
    shutil.rmtree(options.out / WORK)
    return description


def _backups(
    options: ProtectOptions,
    lesson: Lesson,
    single: OpenModel,
    cost: Cost,
    began: float,
    notes: list[str],
) -> list[tuple[Candidate, OpenModel]]:
    """Train backups in the time that is left, and return them measured and as they are served."""
    works = WORKS if options.work is None else (options.work,)
    ladder = Ladder(lesson, cost, works, options.out / WORK / "train", options.seed)
    with one_thread():
        entries = ladder.entries()
    left = (1 - MEASURED) * 60 * options.minutes - (time.monotonic() - began)
    found = []
    for trained in ladder.train(entries, _once(options, "seconds", left)):
        name, macs = trained.entry.name, trained.student.macs()
        note = "stopped early: its trial fell behind" if trained.stopped else ""
        with one_thread():
            backup = export_student(options.out, name, trained.student)
            measured = _measured(lesson.teacher, single, cost, name, backup, macs, options.k, note)
        found.append((measured, backup))
    notes += ladder.notes
    return found


def _once(options: ProtectOptions, name: str, value: Any) -> Any:
    """Return what was decided first: a run that goes on trains as the one that was killed."""
    path = options.out / WORK / f"{name}.json"
    if not path.is_file():
        write_json(path, value)
    return read_json(path)


def _notes(teacher: Teacher, repeated: int) -> list[str]:
    """Return what a reader should know of the inputs."""
    notes, count = [], repeated + len(teacher.inputs)
    if repeated:
        notes.append(
            f"{repeated} of {count} inputs ({repeated / count:.1%}) repeat others and were left "
            "out: traffic that repeats some inputs may agree less often"
        )
    if teacher.inputs.labels is not None:
        rows = teacher.rows.test
        right = (teacher.answers[rows] == teacher.inputs.labels[rows]).mean()
        notes.append(
            f"the model itself is right for {right:.1%} of the test inputs: if you expect more, "
            "check --preprocess"
        )
    return notes


def _lesson(
    options: ProtectOptions, teacher: Teacher, notes: list[str]
) -> tuple[Lesson, Mapping[str, Any]]:
    """Decide how training inputs may be changed, and check that an unfinished run decided so.

    Raises:
        UserError: if an unfinished protection has other settings.
    """
    images = kind_of(teacher) == "images"
    assert teacher.model.signature.scores is not None
    settings = {
        "model": teacher.model.source.digest,
        "scores": f"{teacher.model.signature.scores.output}:{teacher.kind}",
        "inputs": teacher.inputs.digest(),
        "k": options.k,
        "seed": options.seed,
        "work": options.work,
        "mirror": options.mirror,
    }
    changed = differing_keys(_once(options, "settings", settings), settings)
    if changed:
        raise UserError(
            f"--out: {options.out} holds an unfinished protection with other settings "
            f"({', '.join(changed)}): name another folder, or delete {options.out / WORK}"
        )
    if not images:
        return Lesson(teacher), settings
    shift = _once(options, "shift", teacher.largest_shift())
    mirrored, mirror = None, options.mirror
    if mirror:
        mirrored = teacher.mirrored(MIRRORED_SHARE * 60 * options.minutes)
        steady = mirrored is not None or teacher.agreement_when(teacher.mirror) >= STEADY
        mirror = _once(options, "mirrored", steady)
        if not mirror:
            notes.append(
                "images are not mirrored in training: the model often answers mirrored images "
                "differently, and scoring all of them takes too much of --minutes"
            )
    return Lesson(teacher, mirror, mirrored if mirror else None, shift), {
        **settings,
        "shift": shift,
        "mirrored": mirror,
    }


def _cost(single: OpenModel, teacher: Teacher, notes: list[str]) -> Cost:
    cost = model_cost(single, teacher.inputs.batch(np.arange(1)))
    if cost.macs is None:
        notes.append(f"sizes go by measured time, because multiply-adds are not known: {cost.why}")
    return cost


def _measured(
    teacher: Teacher,
    single: OpenModel,
    cost: Cost,
    name: str,
    backup: OpenModel,
    macs: int,
    k: int,
    note: str,
) -> Candidate:
    """Measure a backup as it is served: its time in turn with the model's, and its answers."""
    one = teacher.inputs.batch(np.arange(1))
    times = milliseconds({"model": lambda: single.run(one), "backup": lambda: backup.run(one)})
    by_time = times["backup"].median / times["model"].median
    by_macs = None if cost.macs is None else macs / cost.macs
    work = by_time if by_macs is None else by_macs
    calibration, test = (
        _answers(teacher, backup, rows) for rows in (teacher.rows.calibration, teacher.rows.test)
    )
    timed = (times["backup"], times["model"])
    return Candidate(name, work, *timed, calibration, test, macs, by_macs, k, note)


def _answers(teacher: Teacher, backup: OpenModel, rows: np.ndarray) -> Answers:
    assert backup.signature.scores is not None
    batches = np.split(rows, range(BATCH, len(rows), BATCH))
    scores = np.concatenate([scores_of(backup, teacher.inputs.batch(b)) for b in batches])
    labels = teacher.inputs.labels
    logs = log_probabilities(scores, backup.signature.scores.kind)
    return measure.answers_of(logs, teacher.answers[rows], None if labels is None else labels[rows])


def _row(candidate: Candidate, backup: OpenModel) -> dict[str, Any]:
    scores = backup.signature.scores
    assert scores is not None
    file = {"digest": backup.source.digest, "scores": f"{scores.output}:{scores.kind}"}
    return {**measure.report(candidate), **file}


def _calibrate(out: Path, teacher: Teacher, candidates: list[Candidate]) -> None:
    """Write the curves of all backups; their answers do not depend on a group's other members."""
    curves = {}
    for candidate in candidates:
        own = candidate.calibration
        curve = Curve.of(own.confidence[:, None], own.agrees[:, None])
        for answer in (DECODED, GUESSED):
            curves[Kind(candidate.name, candidate.k, answer)] = curve
    count = len(teacher.rows.calibration)
    Calibration(teacher.model.source.digest, count, curves).save(out / FILE)
    print(f"{out}: calibrated with {count} inputs", file=sys.stderr)
