"""`codedinvnet protect`: ask the model, train backups, measure them, and recommend one."""

from __future__ import annotations

import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from codedinvnet.codes.base import check_k
from codedinvnet.common.errors import UserError
from codedinvnet.common.files import check_folder, write_json
from codedinvnet.common.provenance import describe_command, describe_commit, describe_machine
from codedinvnet.models import ModelSource, OpenModel
from codedinvnet.protection.calibration import DECODED, FILE, GUESSED, Calibration, Kind
from codedinvnet.protection.costs import MOST_TIME, Interval, milliseconds
from codedinvnet.protection.folder import CONFIDENCE, DESCRIPTION, FORMAT, export_student
from codedinvnet.protection.inputs import Given, read_inputs, split
from codedinvnet.protection.ladder import WORKS, Ladder, Trained, once
from codedinvnet.protection.measure import Answers, Candidate, interval, recommend, report
from codedinvnet.protection.students import Student, kind_of
from codedinvnet.protection.teacher import Lesson, Teacher, ask, batches
from codedinvnet.training.loop import differing_keys

WORK = "work"
"""The folder, in an unfinished protection, of scores and checkpoints."""
MIRRORED, PASTED = 0.25, 0.1
"""Shares of the minutes that the model may take to score mirrored images, or all changed inputs."""
FEWEST_WAYS, MOST_WAYS = 4, 8
"""If fewer are affordable, there won't be enough epochs to learn inputs by heart."""
MEASURED = 0.05
"""Share of the minutes that is kept for exports and measurements."""
MEANING = ("task", "output", "tolerance", "cosine")
"""Options that say what the model's output means."""


@dataclass(frozen=True)
class ProtectOptions:
    """What `codedinvnet protect` is asked for. See `read_inputs` for its inputs.

    Attributes:
        source: the served model, on as many threads as training may take.
        k: queries of a group, for policies that send the backup everything.
        minutes: time for scoring and training together.
        work: the only size of backup, as a share of the model's time; None: a ladder of them.
        seed: of the split and the trainings.
        mirror: whether images may be mirrored in training.
        task, output, tolerance, cosine: see `teacher.ask`.
    """

    source: ModelSource
    inputs: Given
    out: Path
    k: int = 10
    minutes: float = 30.0
    work: float | None = None
    seed: int = 0
    preprocess: str = ""
    mirror: bool = True
    task: str | None = None
    output: str | None = None
    tolerance: str | None = None
    cosine: float | None = None


def make_protection(options: ProtectOptions) -> dict[str, Any]:
    """Make a protection and return its description.

    Raises:
        UserError: if the model, the inputs or the options do not allow one.
    """
    began, computed = time.monotonic(), time.process_time()
    check_k(options.k)
    if options.work is not None and not 0 < options.work <= MOST_TIME:
        raise UserError(
            f"--work: must be above 0 and at most {MOST_TIME:g}, got {options.work}: a copy of the "
            "model does better than a backup that takes longer"
        )
    check_folder(options.out, "--out")
    if (options.out / DESCRIPTION).exists():
        raise UserError(f"--out: {options.out} already holds a protection: name another folder")
    notes: list[str] = []
    teacher = _teacher(options, notes)
    settings = _settings(options, teacher)
    lesson = _lesson(options, teacher, notes)
    torch.set_num_threads(1)  # as a server
    single = replace(teacher.model.source, threads=1).open()
    timed = partial(_timed, options.out / WORK, teacher, single)
    works = WORKS if options.work is None else (options.work,)
    ladder = Ladder(lesson, timed, works, _trainings(options), options.seed)
    candidates = ladder.candidates()
    torch.set_num_threads(options.source.threads)
    left = (1 - MEASURED) * 60 * options.minutes - (time.monotonic() - began)
    trained = ladder.train(candidates, once(_trainings(options) / "seconds.json", lambda: left))
    torch.set_num_threads(1)
    backups = [_measured(options.out, each, teacher, single) for each in trained]
    torch.set_num_threads(options.source.threads)
    calibration_of(teacher, backups, options.k).save(options.out / FILE)
    description = {
        "format_version": FORMAT,
        **described(teacher, backups, options.k),
        "notes": notes + ladder.notes,
        "settings": {
            **settings,
            "preprocess": options.preprocess,
            "shift": lesson.shift,
            "variants": len(lesson.pasted) - 1,
            "minutes": options.minutes,
        },
        "seconds": round(time.monotonic() - began, 1),
        "processor_seconds": round(time.process_time() - computed, 1),
        "command": describe_command(),
        "commit": describe_commit(),
        "machine": describe_machine(),
    }
    write_json(options.out / DESCRIPTION, description)
    shutil.rmtree(options.out / WORK)
    return description


def _trainings(options: ProtectOptions) -> Path:
    """Return the folder of trainings, and of what depends on the time for them."""
    return options.out / WORK / f"train-{options.minutes:g}"


def _teacher(options: ProtectOptions, notes: list[str]) -> Teacher:
    """Open the model, read the inputs, and have it answer them."""
    torch.set_num_threads(options.source.threads)  # an ONNX file sets none
    model = options.source.open()
    found = read_inputs(options.inputs, model.signature, options.preprocess)
    inputs = found.distinct()
    if repeated := len(found) - len(inputs):
        notes.append(
            f"{repeated} of {len(found)} inputs ({repeated / len(found):.1%}) repeat others and "
            "were left out: traffic that repeats some inputs may agree less often"
        )
    rows = split(len(inputs), options.seed)
    if options.k > len(rows.test):
        raise UserError(f"--k {options.k}: only {len(rows.test)} inputs are held out for tests")
    meaning = {name: getattr(options, name) for name in MEANING}
    return ask(model, inputs, rows, options.out / WORK, options.minutes, **meaning)


def calibration_of(teacher: Teacher, backups: Sequence[Candidate], k: int) -> Calibration:
    """Return the curves of backups."""
    curves = {
        Kind(each.name, k, answer): each.curve for each in backups for answer in (DECODED, GUESSED)
    }
    return Calibration(teacher.model.source.digest, len(teacher.rows.calibration), curves)


def described(teacher: Teacher, backups: Sequence[Candidate], k: int) -> dict[str, Any]:
    """Describe the model and its backups, and recommend one."""
    rows, source = teacher.rows, teacher.model.source
    common = teacher.task.chance(teacher.outputs, rows.train)
    chance = float(common[rows.calibration].mean())
    recommended, limit, reason = recommend(backups, chance)
    return {
        "model": {
            "source": source.source,
            "weights": source.weights,
            "scores": source.scores,
            "inputs": source.inputs,
            "digest": source.digest,
            "output": teacher.output.name,
            "task": teacher.task.describe(),
        },
        "k": k,
        "recommended": recommended,
        "limit": limit,
        "reason": reason,
        "table": [report(each, k) for each in backups],
        "one_answer": interval(common[rows.test]),
        "split": {part: len(found) for part, found in rows._asdict().items()},
    }


def _settings(options: ProtectOptions, teacher: Teacher) -> Mapping[str, Any]:
    """Return what the backups depend on.

    Raises:
        UserError: if the folder holds an unfinished protection with other settings.
    """
    settings = {
        "model": teacher.model.source.digest,
        "output": f"{teacher.output.name}: {teacher.task.describe()}",
        "inputs": teacher.inputs.digest,
        "k": options.k,
        "seed": options.seed,
        "work": options.work,
        "mirror": options.mirror,
    }
    folder = options.out / WORK
    changed = differing_keys(once(folder / "settings.json", lambda: settings), settings)
    if changed:
        raise UserError(
            f"--out: {options.out} holds an unfinished protection with other settings "
            f"({', '.join(changed)}): name another folder, or delete {folder}"
        )
    return settings


def _lesson(options: ProtectOptions, teacher: Teacher, notes: list[str]) -> Lesson:
    """Decide how training inputs may be changed."""
    if (kind := kind_of(teacher)) in ("vectors", "signals"):
        return Lesson(teacher)
    images = kind == "images"
    seconds, minute = teacher.seconds * len(teacher.rows.train), 60 * options.minutes
    affordable = min(MOST_WAYS, int(PASTED * minute / seconds))
    if affordable < FEWEST_WAYS:
        affordable = int(images and seconds <= MIRRORED * minute)
    count = once(_trainings(options) / "variants.json", lambda: affordable)
    if not count:
        notes.append("inputs stay as they are: scoring changed ones takes too much of --minutes")
    mirror = images and options.mirror
    ways = [(True, False)] if count and mirror else []
    ways += [(mirror and number % 2 > 0, True) for number in range(1, count)]
    return Lesson(teacher, ways, teacher.largest_shift() if images else 0)


def _timed(folder: Path, teacher: Teacher, single: OpenModel, student: Student) -> float:
    """Return the share of the model's time that a student takes, each as it is served."""
    backup = export_student(folder, "timed", student, teacher)
    times = _times(teacher, single, backup)
    return times["backup"].value / times["model"].value


def _times(teacher: Teacher, single: OpenModel, backup: OpenModel) -> dict[str, Interval]:
    one = teacher.inputs.batch(np.arange(1))
    return milliseconds({"model": lambda: single.run(one), "backup": lambda: backup.run(one)})


def _measured(out: Path, trained: Trained, teacher: Teacher, single: OpenModel) -> Candidate:
    """Export a backup and measure it as it is served; its time in turn with the model's."""
    backup = export_student(out, trained.name, trained.student, teacher)
    note = "stopped early: its trial fell behind" if trained.stopped else ""
    return measured(trained.name, backup, _times(teacher, single, backup), teacher, note)


def measured(
    name: str, backup: OpenModel, times: Mapping[str, Interval], teacher: Teacher, note: str
) -> Candidate:
    """Return what a backup's answers to the calibration and the test inputs are worth."""
    inputs, task, served = teacher.inputs, teacher.task, teacher.outputs

    def answers(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        found = [backup.run(inputs.batch(part)) for part in batches(rows)]
        values = np.concatenate([part[teacher.output.name] for part in found])
        sure = np.concatenate([part[CONFIDENCE] for part in found])
        return values.reshape(len(values), -1), sure

    (calibrated, sure), (tested, test_sure) = map(answers, teacher.rows[2:])
    calibration, test = served[teacher.rows.calibration], served[teacher.rows.test]
    return Candidate(
        name,
        backup.source.digest,
        times["backup"],
        times["model"],
        Answers(sure, task.agree(calibrated, calibration)),
        Answers(test_sure, task.agree(tested, test)),
        note,
        task.report(tested, test),
    )
