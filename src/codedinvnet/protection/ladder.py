"""Train backups of several sizes in the time: trials of all, then the best of each size."""

from __future__ import annotations

import copy
import sys
from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch

from codedinvnet.common.config import PartSettings
from codedinvnet.common.errors import UserError, one_line
from codedinvnet.common.files import read_json, write_json
from codedinvnet.common.progress import Progress
from codedinvnet.protection.distil import Distillation, plan
from codedinvnet.protection.students import STUDENTS, Choice, Student, kind_of
from codedinvnet.protection.teacher import Lesson
from codedinvnet.training.loop import LATEST, train_stage

WORKS = (0.1, 0.25, 0.45)
"""Sizes of backups, in the served model's time. The last one stays below `MOST_TIME`, although a
timing varies by a few percent."""
TRIALS = 0.35
"""Share of the time for trials, if there are several candidates. Best ones go on from theirs, so
only what the others took is lost; in shorter ones small networks beat those that end ahead."""
HOPELESS = 0.05
"""A size whose best trial agrees this much less often than the best trial is trained no further."""


@dataclass
class Trained:
    """A candidate: a network of a class at a size, with its best weights.

    Attributes:
        work: the size.
        student: the network.
        score: its agreement on the validation inputs; below 0 before any training.
        stopped: whether it was trained no further than a trial.
    """

    work: float
    student: Student
    score: float = -1.0
    stopped: bool = False

    @property
    def name(self) -> str:
        """The name of its row, and of its file."""
        return f"{self.student.family}-{self.work:g}"


def once(path: Path, decide: Callable[[], Any]) -> Any:
    """Return what was decided first: a run that goes on trains as the one that was killed."""
    if not path.is_file():
        write_json(path, decide())
    return read_json(path)


@dataclass
class Ladder:
    """Trains candidates; every finished training is kept, so a killed run goes on.

    Attributes:
        lesson: what they are trained with.
        timed: returns the share of the model's time that a student takes, as it is served.
        works: the sizes, ascending.
        folder: keeps trainings.
        seed: of all trainings.
        notes: what a reader of the table should know.
    """

    lesson: Lesson
    timed: Callable[[Student], float]
    works: Sequence[float]
    folder: Path
    seed: int
    notes: list[str] = field(default_factory=list)

    def candidates(self) -> list[Trained]:
        """Return the untrained candidates: of each class the largest one within each size."""
        teacher, found = self.lesson.teacher, list[Trained]()
        for family, student in STUDENTS.items():
            if kind_of(teacher) in student.kinds:
                path = self.folder / f"{family}.json"
                for work, choice in once(path, partial(self._chosen, student)):
                    torch.manual_seed(self.seed)
                    found.append(Trained(work, student(teacher, choice)))
        return found

    def _chosen(self, kind: type[Student]) -> list[tuple[float, Choice]]:
        """Return sizes, and the largest choice within each; notes say why there are no others."""
        teacher, found = self.lesson.teacher, dict[int, tuple[float, Choice]]()
        try:
            sizes = kind.sizes(teacher)

            @cache
            def choice(place: int) -> Choice:
                return kind.choose(teacher, sizes[place])

            @cache
            def time(place: int) -> float:
                return self.timed(kind(teacher, choice(place)).eval())

            for work in self.works:
                place = bisect_right(range(len(sizes)), work, key=time) - 1
                if place >= 0:
                    found.setdefault(place, (work, choice(place)))
            if not found:
                least = f"the quickest takes {time(0):.2f} of the model's time"
                self.notes.append(f"no {kind.family}: {least}")
        except Exception as error:  # a stranger's graph may fail in any way
            self.notes.append(f"no {kind.family}: {one_line(error)}")
        return [*found.values()]

    def train(self, candidates: Sequence[Trained], seconds: float) -> list[Trained]:
        """Return the best candidate of each size, trained within so many seconds.

        Raises:
            UserError: if there is time for none.
        """
        if not candidates:
            return []
        found = list(candidates)
        if len(found) > 1:
            found = self._round("trial", found, TRIALS * seconds)
            seconds *= 1 - TRIALS
            scores = ", ".join(f"{t.name} {100 * t.score:.1f} %" for t in found)
            self.notes.append(f"agreement on validation inputs after trials: {scores}")
        found.sort(key=lambda trained: trained.score)
        best = {trained.work: trained for trained in found}  # the last of a size
        for trained in best.values():
            trained.stopped = 0 <= trained.score < found[-1].score - HOPELESS
        going = [trained for trained in best.values() if not trained.stopped]
        for trained in self._round("final", going, seconds):
            best[trained.work] = trained
        found = [best[work] for work in sorted(best) if best[work].score >= 0]
        if not found:
            raise UserError("; ".join(self.notes) or "no backup can be trained for this model")
        return found

    def _round(self, name: str, started: Sequence[Trained], seconds: float) -> list[Trained]:
        """Train each for a share of the time in proportion to its work, and note failures."""
        found, left = [], seconds
        whole = sum(trained.work for trained in started)
        for number, trained in enumerate(started, 1):
            share = seconds * trained.work / whole
            Progress.write(
                f"{name} {number} of {len(started)}: {trained.name}; about {left / 60:.0f} minutes "
                "left in this round",
                file=sys.stderr,
            )
            left -= share
            try:
                trained = self._trained(self.folder / f"{name}-{trained.name}", trained, share)
            except UserError as error:  # no time for a step, or its loss diverged
                self.notes.append(f"{trained.name}: {error}")
            found.append(trained)
        return found

    def _trained(self, folder: Path, started: Trained, seconds: float) -> Trained:
        student = copy.deepcopy(started.student)

        def planned() -> dict[str, Any]:
            part = plan(copy.deepcopy(student), self.lesson, seconds)
            return {"seconds": seconds, "part": part.model_dump()}

        found = once(folder / "plan.json", planned)
        part = PartSettings.model_validate(found["part"])
        stage = Distillation(student, self.lesson, part, found["seconds"])
        header = train_stage(
            stage,
            folder,
            epochs=part.epochs,
            seed=self.seed,
            settings={"part": part.model_dump(), "family": student.family},
            resume=LATEST,
            replan=stage.replan,
        )
        trained = Trained(started.work, student.eval(), float(header["score"]))
        return started if trained.score < started.score else trained  # the trial's were better
