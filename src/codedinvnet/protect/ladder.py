"""Train backups of several sizes in the time: short trials, then the best class at each size."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch

from codedinvnet.common.config import PartSettings
from codedinvnet.common.errors import UserError
from codedinvnet.common.files import read_json, write_json
from codedinvnet.common.progress import Progress
from codedinvnet.protect import own  # noqa: F401 - registers its students
from codedinvnet.protect.costs import Cost
from codedinvnet.protect.distil import Distillation, Lesson, plan
from codedinvnet.protect.students import STUDENTS, Budget, Choice, Student, Unfit, kind_of
from codedinvnet.training.loop import LATEST, train_stage

WORKS = (0.1, 0.25, 0.5)
"""Sizes of backups, in the served model's work."""
FIRST = ("fewer-blocks", "smaller-images", "early-exit")
"""Candidates that learn fastest, because they start from the model's own weights."""
TRIALS = 0.15
"""Share of the time for trials, if there are several candidates."""
HOPELESS = 0.05
"""A size whose trial agrees less often than the best one's by this much is trained no further."""


class Entry(NamedTuple):
    """A candidate: a class of students at a size."""

    work: float
    family: str
    choice: Choice

    @property
    def name(self) -> str:
        """The name of its row, and of its file."""
        return f"{self.family}-{self.work:g}"


@dataclass
class Trained:
    """A trained candidate.

    Attributes:
        entry: what it is.
        student: the network with its best weights.
        score: its agreement on the validation inputs.
        stopped: whether it was trained no further than a trial.
    """

    entry: Entry
    student: Student
    score: float
    stopped: bool = False


class Ladder:
    """Trains candidates; every finished training is kept, so a killed run goes on.

    Args:
        lesson: what they are trained with.
        cost: the served model's.
        works: the sizes.
        folder: keeps trainings.
        seed: of all trainings.
    """

    def __init__(
        self, lesson: Lesson, cost: Cost, works: Sequence[float], folder: Path, seed: int
    ) -> None:
        self.lesson, self.cost, self.works = lesson, cost, works
        self.folder, self.seed = folder, seed
        self.notes: list[str] = []
        """What a reader of the table should know."""

    def entries(self) -> list[Entry]:
        """Return the candidates; a note says why a class has none.

        A size that gives the same network as a smaller one is left out.
        """
        teacher, found = self.lesson.teacher, list[Entry]()
        kind, seen = kind_of(teacher), list[tuple[str, Choice]]()
        for work in sorted(self.works):
            for family, student in STUDENTS.items():
                if kind not in student.kinds:
                    continue
                path = self.folder / f"choice-{family}-{work:g}.json"
                try:
                    if not path.is_file():  # measured times would choose another one
                        write_json(path, student.choose(teacher, Budget(work, self.cost)))
                except Unfit as error:
                    self.notes.append(f"no {family}-{work:g}: {error}")
                    continue
                choice = read_json(path)
                if (family, choice) not in seen:
                    seen.append((family, choice))
                    found.append(Entry(work, family, choice))
        return found

    def train(self, entries: Sequence[Entry], seconds: float) -> list[Trained]:
        """Return the best candidate of each size, trained within so many seconds.

        Raises:
            UserError: if there is time for none.
        """
        found, sizes = list[Trained](), list(dict.fromkeys(entry.work for entry in entries))
        if len(entries) > 1:
            found = self._trials(entries, sizes, TRIALS * seconds)
            seconds *= 1 - TRIALS
        found = [self._best(work, found, entries) for work in sizes]
        highest = max((trained.score for trained in found), default=0.0)
        for trained in found:
            trained.stopped = 0 <= trained.score < highest - HOPELESS
        going = [trained for trained in found if not trained.stopped]
        finished = {t.entry.name: t for t in self._round("final", going, seconds)}
        found = [finished.get(t.entry.name, t) for t in found]
        if not any(trained.score >= 0 for trained in found):
            raise UserError("; ".join(self.notes) or "no backup can be trained for this model")
        return [trained for trained in found if trained.score >= 0]

    def _trials(
        self, entries: Sequence[Entry], sizes: Sequence[float], seconds: float
    ) -> list[Trained]:
        """Try all classes at a size in the middle that has most of them; the best at the others."""
        count = Counter(entry.work for entry in entries)
        full = [work for work in sizes if count[work] == max(count.values())]
        middle = full[len(full) // 2]
        classes = [entry for entry in entries if entry.work == middle]
        second = seconds / (sum(entry.work for entry in classes) + sum(sizes) - middle)
        found = self._try(classes, second)
        found.sort(key=lambda trained: -trained.score)
        best = [self._best(work, found, entries).entry for work in sizes if work != middle]
        found += self._try(best, second)
        scores = ", ".join(f"{t.entry.name} {100 * t.score:.1f} %" for t in found)
        self.notes.append(f"agreement on validation inputs after short trials: {scores}")
        return found

    def _try(self, entries: Sequence[Entry], second: float) -> list[Trained]:
        """Train new students, each for so many seconds times its work."""
        seconds = second * sum(entry.work for entry in entries)
        return self._round("trial", [self._fresh(entry) for entry in entries], seconds)

    def _best(self, work: float, trials: Sequence[Trained], entries: Sequence[Entry]) -> Trained:
        """Return a size's candidate of the class that did best so far; its trial, if it had one.

        Classes without a trial come last, in the order of FIRST.
        """
        order = [*(trained.entry.family for trained in trials), *FIRST, *STUDENTS]
        mine = [entry for entry in entries if entry.work == work]
        best = min(mine, key=lambda entry: order.index(entry.family))
        tried = [trained for trained in trials if trained.entry == best]
        return tried[0] if tried else self._fresh(best)

    def _fresh(self, entry: Entry) -> Trained:
        torch.manual_seed(self.seed)
        student = STUDENTS[entry.family](self.lesson.teacher, entry.choice)
        return Trained(entry, student, -1.0)

    def _round(self, name: str, started: Sequence[Trained], seconds: float) -> list[Trained]:
        """Train each for a share of the time in proportion to its work, and note failures."""
        found, left = [], seconds
        whole = sum(trained.entry.work for trained in started)
        for number, trained in enumerate(started, 1):
            entry = trained.entry
            share = seconds * entry.work / whole
            Progress.write(
                f"{name} {number} of {len(started)}: {entry.name}; about {left / 60:.0f} minutes "
                "left in this round",
                file=sys.stderr,
            )
            left -= share
            try:
                found.append(self._trained(name, trained, share))
            except UserError as error:  # no time for a step, or its loss diverged
                self.notes.append(f"{entry.name}: {error}")
                if trained.score >= 0:
                    found.append(trained)
        return found

    def _trained(self, round_: str, started: Trained, seconds: float) -> Trained:
        entry, student = started.entry, started.student
        folder = self.folder / f"{round_}-{entry.name}"
        path = folder / "plan.json"
        before = {key: value.clone() for key, value in student.state_dict().items()}
        if not path.is_file():
            try:
                part = plan(student, self.lesson, seconds)
            finally:  # it did some steps
                student.load_state_dict(before)
            folder.mkdir(parents=True, exist_ok=True)
            write_json(path, {"seconds": seconds, "part": part.model_dump()})
        planned = read_json(path)
        part = PartSettings.model_validate(planned["part"])
        stage = Distillation(student, self.lesson, part, planned["seconds"])
        header = train_stage(
            stage,
            folder,
            epochs=part.epochs,
            seed=self.seed,
            settings={"part": part.model_dump(), "family": entry.family},
            resume=LATEST,
            replan=stage.replan,
        )
        score = float(header["score"])
        if score < started.score:  # the trial's weights were better
            student.load_state_dict(before)
            return started
        return Trained(entry, student.eval(), score)
