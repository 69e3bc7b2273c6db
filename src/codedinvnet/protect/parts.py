"""The trained parts of a protection: within the minutes, and resumed after a kill."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from codedinvnet.config import PartSettings
from codedinvnet.errors import UserError
from codedinvnet.files import read_json, write_json
from codedinvnet.models.graph import Graph, Unsupported
from codedinvnet.protect import costs
from codedinvnet.protect.coding import CodingStage
from codedinvnet.protect.distil import BudgetStage, DistilStage, Lesson, plan
from codedinvnet.protect.folder import CODE, PARTS, load_part, save_part
from codedinvnet.protect.frozen import FrozenCoder, encoder_macs
from codedinvnet.protect.images import layout
from codedinvnet.protect.setting import WORK, ProtectOptions, Setting
from codedinvnet.protect.shrunk import graph_of, shrunk_shape
from codedinvnet.protect.students import Shape, ShrunkStudent, Student, words_of
from codedinvnet.protect.teacher import (
    CHANGED,
    STEADY,
    agreement_when,
    check_teacher,
    teacher_scores,
)
from codedinvnet.training.loop import LATEST, train_stage
from codedinvnet.trust.confidence import log_probabilities

MIRRORED_SHARE = 0.25
"""Share of the minutes that asking the model for mirrored images may take."""
SAMPLE = 1000
"""Inputs from which scales are taken."""

TRIAL = 0.1
"""Share of a part's time for which each of several students is tried."""
TRIED = 8
"""Inputs for which the model and its graph must agree."""


class Offer(NamedTuple):
    """What a part may be."""

    title: str
    make: Callable[[], nn.Module]
    """Makes it, untrained."""
    stage: Callable[[nn.Module, PartSettings, float], BudgetStage]
    """Makes its training, within so many seconds."""
    shape: Shape


class Trainer:
    """Trains one part after another, each in its share of the time that is left.

    Args:
        options: the options of the command.
        setting: the model and its inputs.
        settings: what the protection depends on.
        parts: how many parts there will be.
        began: when the command began, by `time.monotonic`.
    """

    def __init__(
        self,
        options: ProtectOptions,
        setting: Setting,
        settings: Mapping[str, Any],
        parts: int,
        began: float,
    ) -> None:
        self.options, self.setting, self.settings = options, setting, settings
        self.parts, self.began = parts, began
        self.notes: list[str] = []
        """What a reader of the table should know."""
        self._lesson: Lesson | None = None

    @property
    def lesson(self) -> Lesson:
        """The inputs with the model's answers; mirrored ones are asked for if there is time."""
        if self._lesson is None:
            self._lesson = self._made()
        return self._lesson

    def student(self, name: str, work: float) -> Student:
        """Return a small backup that costs no more than so many services, trained.

        Where the served model's own network can be run on smaller images, both kinds are tried.

        Args:
            name: the name of the method's row.
            work: the most that it may cost for a query, in services of the model.
        """
        offers = self._offers(name, work)
        try:
            offer = offers[0] if len(offers) == 1 else self._better(name, offers)
            found = self._fitted(name, offer)
        except UserError:  # with more minutes they are tried anew
            self._tried(name).unlink(missing_ok=True)
            raise
        assert isinstance(found, Student)
        return found

    def _offers(self, name: str, work: float) -> list[Offer]:
        """Return the students that a part may be."""
        shape = self._shape(name, work)
        if self.settings["kind"] != "images" or self.setting.macs is None:
            return [self._offer(shape)]
        try:
            batch = self.setting.inputs.batch(self.setting.rows.train[:TRIED])
            graph = graph_of(self.setting.model, batch)
            smaller = shrunk_shape(shape, graph, int(self.setting.macs * work))
        except Unsupported as error:
            self._note(f"the backup is not the model on smaller images: {error}")
            return [self._offer(shape)]
        return [self._offer(shape), self._offer(smaller, graph)]

    def _offer(self, shape: Shape, graph: Graph | None = None) -> Offer:
        rows = self.setting.spread(SAMPLE)

        def make() -> Student:
            student = shape.build()
            if isinstance(student, ShrunkStudent) and graph is not None:
                student.network.load_state_dict(graph.state_dict())
            else:
                student.learn_scale(self.setting.inputs.batch(rows))
            return student

        def stage(student: nn.Module, part: PartSettings, seconds: float) -> BudgetStage:
            assert isinstance(student, Student)
            return DistilStage(student, self.lesson, part, seconds)

        title = "a fresh network" if graph is None else ShrunkStudent.title
        return Offer(title, make, stage, shape)

    def _better(self, name: str, offers: Sequence[Offer]) -> Offer:
        """Train each for a share of the time, and return the one that agreed more often."""
        path = self._tried(name)
        if not path.is_file():
            scores: dict[str, float] = {}
            for number, offer in enumerate(offers):
                share = TRIAL / (self.parts - TRIAL * number)
                try:
                    scores[offer.title] = self._trained(f"{name}-{number}", offer, share)[1]
                except UserError as error:  # there is no time for an epoch, or its loss diverged
                    self._note(f"{name}: {offer.title} is left out: {error}")
                    scores[offer.title] = 0.0
            write_json(path, scores)
        scores = dict(read_json(path))
        best = max(offers, key=lambda offer: float(scores[offer.title]))
        told = ", ".join(f"{title} {100 * score:.1f} %" for title, score in scores.items())
        self._note(f"{name}: validation inputs agreed on after short trainings: {told}")
        return best

    def _tried(self, name: str) -> Path:
        return self.options.out / WORK / f"tried-{name}.json"

    def _note(self, line: str) -> None:
        if line not in self.notes:
            self.notes.append(line)

    def coder(self, scores: Callable[[Tensor], Tensor]) -> FrozenCoder:
        """Return E and its head, trained; E costs no more for a group than the model for a query.

        Args:
            scores: the model's of queries, with gradients.
        """
        setting, k = self.setting, self.options.k
        specs, classes = setting.model.signature.inputs, setting.scores.shape[1]
        kind = self.settings["kind"]

        def coder(width: int) -> FrozenCoder:
            return FrozenCoder(Shape(kind, width, classes, specs), setting.kind).eval()

        width = costs.largest_width(coder, lambda made: encoder_macs(made, k), setting.macs or 0)
        rows = setting.spread(SAMPLE)
        batch = setting.inputs.batch(rows)
        levels = coder(1).level(torch.from_numpy(setting.scores[rows]))

        def make() -> FrozenCoder:
            made = coder(width)
            made.learn_scale(batch, levels)
            return made

        def stage(made: nn.Module, part: PartSettings, seconds: float) -> BudgetStage:
            assert isinstance(made, FrozenCoder)
            return CodingStage(made, scores, self.lesson, k, part, seconds)

        found = self._fitted(CODE, Offer(CODE, make, stage, coder(width).shape))
        assert isinstance(found, FrozenCoder)
        return found

    def _fitted(self, name: str, offer: Offer) -> nn.Module:
        """Train a part, or go on with it, or read it if it is finished.

        It stands beside the settings that it was made with until the protection is finished.
        """
        final = self.options.out / WORK / PARTS[name]
        self.parts -= 1
        if final.is_file():  # killed later on
            return load_part(final)
        part, _ = self._trained(name, offer, 1 / (self.parts + 1))
        save_part(final, part)
        return part.eval()

    def _trained(self, name: str, offer: Offer, share: float) -> tuple[nn.Module, float]:
        """Train in a share of the time that is left; return it with its validation score."""
        options, make = self.options, offer.make
        torch.manual_seed(options.seed)
        part = make()
        folder = options.out / WORK / name
        path = folder / "plan.json"
        if not path.is_file():
            count = len(self.lesson.train)  # mirrored images may be asked for here
            left = 60 * options.minutes - (time.monotonic() - self.began)
            seconds = left * share
            spare = make()
            rates = getattr(part, "rates", {})
            found = plan(lambda p: offer.stage(spare, p, seconds), count, seconds, rates)
            folder.mkdir(parents=True, exist_ok=True)
            write_json(path, {"seconds": seconds, "part": found.model_dump()})
        planned = read_json(path)
        told = PartSettings.model_validate(planned["part"])
        made = offer.stage(part, told, planned["seconds"])
        header = train_stage(
            made,
            folder,
            epochs=told.epochs,
            seed=options.seed,
            settings={**self.settings, "part": told.model_dump(), "shape": offer.shape.as_json()},
            resume=LATEST,
            replan=made.replan,
        )
        return part, float(header["score"])

    def _made(self) -> Lesson:
        setting, settings = self.setting, self.settings
        mirrored, flip = None, settings["flip"]
        if flip:
            (spec,) = setting.model.signature.inputs
            axis = 2 if layout(spec)[1] else 3
            if self._decided("mirrored", self._has_time_for_mirrored):
                scores = teacher_scores(setting.model, setting.inputs, setting.work, mirrored=axis)
                mirrored = log_probabilities(scores, setting.kind)
            elif not self._decided("flip", lambda: self._is_steady_when_mirrored(axis)):
                flip = False
                self._note(
                    "images are not mirrored in training: the model gives too many of them other "
                    "answers then, and asking for all takes too much of --minutes"
                )
        return Lesson(
            setting.inputs,
            setting.rows.train,
            np.random.default_rng(self.options.seed).permutation(setting.rows.validation),
            log_probabilities(setting.scores, setting.kind),
            mirrored,
            flip,
            settings["shift"],
        )

    def _decided(self, name: str, decide: Callable[[], bool]) -> bool:
        """Decide something of all trainings; once a part is planned, that stays.

        A training that goes on learns the same then, however fast the model answers now.
        """
        work = self.options.out / WORK
        path = work / f"{name}.json"
        if not (path.is_file() and any(work.glob("*/plan.json"))):
            write_json(path, decide())
        return bool(read_json(path))

    def _has_time_for_mirrored(self) -> bool:
        """Tell whether the model can be asked for all mirrored images."""
        setting = self.setting
        seconds = check_teacher(setting.model, setting.inputs) * len(setting.inputs)
        there = any(setting.work.glob("mirrored-*"))
        return there or seconds < 60 * self.options.minutes * MIRRORED_SHARE

    def _is_steady_when_mirrored(self, axis: int) -> bool:
        """Tell whether the model keeps its answers of a few images that are mirrored."""
        setting = self.setting
        rows = setting.spread(min(CHANGED, int(MIRRORED_SHARE * len(setting.inputs))))
        model, inputs, answers = setting.model, setting.inputs, setting.answers

        def mirrored(batch: np.ndarray) -> np.ndarray:
            return np.flip(batch, axis)

        return agreement_when(mirrored, model, inputs, rows, answers) >= STEADY

    def _shape(self, name: str, work: float) -> Shape:
        """Return the largest student that costs no more than so many services for a query."""
        setting = self.setting
        path = self.options.out / WORK / f"width-{name}.json"
        words: tuple[int, ...] = ()
        kind, specs = self.settings["kind"], setting.model.signature.inputs
        classes = setting.scores.shape[1]
        if kind == "tokens":
            words = words_of(setting.inputs.arrays[spec.name] for spec in specs)

        def shape(width: int) -> Shape:
            return Shape(kind, width, classes, specs, words)

        if not path.is_file():
            if setting.macs is not None:
                width = costs.width_by_macs(shape, int(setting.macs * work))
            else:
                one = setting.inputs.batch(np.arange(1))
                (found,) = costs.milliseconds({"": lambda: setting.model.run(one)}).values()
                group = setting.inputs.batch(np.arange(self.options.k))
                budget = found.median * work * self.options.k
                width = costs.width_by_time(shape, group, budget)
            write_json(path, width)
        return shape(int(read_json(path)))
