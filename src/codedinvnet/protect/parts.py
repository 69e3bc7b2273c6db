"""The trained parts of a protection: within the minutes, and resumed after a kill."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from codedinvnet.config import PartSettings
from codedinvnet.files import read_json, write_json
from codedinvnet.nn.resnet import width_of_cost
from codedinvnet.protect import costs
from codedinvnet.protect.coding import CodingStage
from codedinvnet.protect.distil import BudgetStage, DistilStage, Lesson, plan
from codedinvnet.protect.folder import CODE, PARTS, load_part, save_part
from codedinvnet.protect.frozen import FrozenCoder, encoder_macs
from codedinvnet.protect.images import layout
from codedinvnet.protect.setting import WORK, ProtectOptions, Setting
from codedinvnet.protect.students import Shape, Student
from codedinvnet.protect.teacher import check_teacher, log_probabilities, teacher_scores
from codedinvnet.training.loop import LATEST, train_stage

MIRRORED_SHARE = 0.25
"""Share of the minutes that asking the model for mirrored images may take."""
SAMPLE = 1000
"""Inputs from which scales are taken."""

Part = TypeVar("Part", bound=nn.Module)


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
        self._lesson: Lesson | None = None

    @property
    def lesson(self) -> Lesson:
        """The inputs with the model's answers; mirrored ones are asked for if there is time."""
        if self._lesson is None:
            self._lesson = self._made()
        return self._lesson

    def student(self, name: str, work: float) -> Student:
        """Return a small backup that costs no more than so many services, trained.

        Args:
            name: the name of the method's row.
            work: the most that it may cost for a query, in services of the model.
        """
        shape = self._shape(name, work)
        batch = self.setting.inputs.batch(self.setting.rows.train[:SAMPLE])

        def make() -> Student:
            student = shape.build()
            student.learn_scale(batch)
            return student

        def stage(student: Student, part: PartSettings, seconds: float) -> BudgetStage:
            return DistilStage(student, self.lesson, part, seconds)

        return self._fitted(name, make, stage, shape)

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

        width = width_of_cost(lambda w: encoder_macs(coder(w), k), setting.macs or 0)
        rows = setting.rows.train[:SAMPLE]
        batch = setting.inputs.batch(rows)
        levels = coder(1).level(torch.from_numpy(setting.scores[rows]))

        def make() -> FrozenCoder:
            made = coder(width)
            made.learn_scale(batch, levels)
            return made

        def stage(made: FrozenCoder, part: PartSettings, seconds: float) -> BudgetStage:
            return CodingStage(made, scores, self.lesson, k, part, seconds)

        return self._fitted(CODE, make, stage, coder(width).shape)

    def _fitted(
        self,
        name: str,
        make: Callable[[], Part],
        stage: Callable[[Part, PartSettings, float], BudgetStage],
        shape: Shape,
    ) -> Part:
        """Train a part, or go on with it, or read it if it is finished."""
        options = self.options
        final = options.out / PARTS[name]
        self.parts -= 1
        if final.is_file():  # killed later on
            return load_part(final)  # type: ignore[return-value]
        torch.manual_seed(options.seed)
        part = make()
        folder = options.out / WORK / name
        path = folder / "plan.json"
        if not path.is_file():
            left = 60 * options.minutes - (time.monotonic() - self.began)
            seconds = left / (self.parts + 1)
            count = len(self.lesson.train)
            spare = make()
            found = plan(lambda p: stage(spare, p, seconds), count, seconds)
            folder.mkdir(parents=True, exist_ok=True)
            write_json(path, {"seconds": seconds, "part": found.model_dump()})
        planned = read_json(path)
        told = PartSettings.model_validate(planned["part"])
        made = stage(part, told, planned["seconds"])
        train_stage(
            made,
            folder,
            epochs=told.epochs,
            seed=options.seed,
            settings={**self.settings, "part": told.model_dump(), "shape": shape.as_json()},
            resume=LATEST,
            replan=made.replan,
        )
        save_part(final, part)
        return part.eval()

    def _made(self) -> Lesson:
        setting, settings = self.setting, self.settings
        mirrored = None
        if settings["flip"]:
            (spec,) = setting.model.signature.inputs
            axis = 2 if layout(spec)[1] else 3
            seconds = check_teacher(setting.model, setting.inputs) * len(setting.inputs)
            there = any(setting.work.glob("mirrored-*"))
            if there or seconds < 60 * self.options.minutes * MIRRORED_SHARE:
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

    def _shape(self, name: str, work: float) -> Shape:
        """Return the largest student that costs no more than so many services for a query."""
        setting = self.setting
        path = self.options.out / WORK / f"width-{name}.json"
        words, kind = 0, self.settings["kind"]
        if kind == "tokens":
            words = 1 + max(int(array.max()) for array in setting.inputs.arrays.values())
        classes, specs = setting.scores.shape[1], setting.model.signature.inputs

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
