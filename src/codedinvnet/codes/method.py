"""The record of a method: all that the rest of the package needs to know of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple

from torch import Tensor, nn

from codedinvnet.codes.base import Code, Scheme, ScoresCode, check_k
from codedinvnet.codes.rules import PARITY_MODEL, SERVED, CodeRules, Parities
from codedinvnet.common.config import PartSettings, Section
from codedinvnet.models.bundle import Bundle, BundleInfo
from codedinvnet.models.coded import CodedModel, prepare
from codedinvnet.models.network import classifier_of


@dataclass(frozen=True)
class Given:
    """What a scheme is made of.

    Attributes:
        k: queries in a group.
        classifier: maps queries (B, *shape) to scores (B, classes).
        shape: the shape of one query.
        classes: how many there are.
        model: f, g and E of the bundle; None without a bundle.
        bundle: its description; None without a bundle.
        stragglers: how many missing outputs of a group to make up for, where that can be chosen.
        part: what the method trained for this classifier and k, in evaluation mode.
        chosen: what `Method.tune` chose.
    """

    k: int
    classifier: nn.Module
    shape: tuple[int, ...]
    classes: int
    model: CodedModel | None = None
    bundle: BundleInfo | None = None
    stragglers: int = 1
    part: nn.Module | None = None
    chosen: Mapping[str, Any] = field(default_factory=dict)

    @property
    def coded(self) -> CodedModel:
        """The bundle's model, for methods that need one."""
        if self.model is None:
            raise ValueError("there is no bundle")
        return self.model


def given_of(model: CodedModel, k: int, **more: Any) -> Given:
    """Return what a model gives a method."""
    return Given(k, classifier_of(model), model.image_shape, len(model.classes), model, **more)


def given_by(bundle: Bundle, k: int, **more: Any) -> Given:
    """Return what a bundle gives a method."""
    return given_of(bundle.model, k, bundle=bundle.info, **more)


class Batch(NamedTuple):
    """Groups of m images to train on; m is 1 for what answers single images."""

    images: Tensor
    """(G, m, C, H, W), floats in 0..1, maybe augmented."""
    logits: Tensor
    """(G, m, classes), the teacher's of the images as they are."""
    labels: Tensor
    """(G, m)."""


class MethodCode(ScoresCode):
    """The code that a method states by its own `encode` and `decode`."""

    def __init__(self, method: Method, rules: CodeRules) -> None:
        super().__init__(rules)
        self.method = method

    def encode(self, task: int, queries: Tensor) -> Tensor:
        return self.method.encode(task - self.rules.k, prepare(queries, padding=0))

    def made_up(self, member: int, outputs: Mapping[int, Tensor], size: int) -> Tensor:
        k = self.rules.k
        answers = {task: output for task, output in outputs.items() if task < size}
        parities = {task - k: output for task, output in outputs.items() if task >= k}
        return self.method.decode(member, answers, parities, size)


class Method:
    """One method: how it encodes and decodes, how it is trained, and what it needs.

    The command line, grids, training, tables, pictures, the server, the simulator and the planner
    read it. A subclass in a user's own file is as good as those of this package. It defines
    `encode` and `decode`, or, if its data tasks do not send scores, `rules` and `build`.
    """

    name: str
    """The method's name on the command line, in grids, rows and tables."""
    parities: ClassVar[int] = 1
    """The queries that `encode` makes of a group, each for an extra worker."""
    of_bundle: ClassVar[bool] = False
    """Whether it is made around f and g of a bundle, and not around any classifier."""
    part: ClassVar[str] = ""
    """The key under which a grid's data set has the budget of its training, such as "backup"; ""
    for a method without a trained part."""
    budget: ClassVar[type[Section]] = PartSettings
    """What that budget holds. Methods with one `part` have one budget."""
    encodes: ClassVar[bool] = False
    """Whether a network encodes, whose work is not in the tasks' cost."""
    any_stragglers: ClassVar[bool] = False
    """Whether it makes up for as many missing outputs as it is asked to."""
    is_policy: ClassVar[bool] = False
    """Whether a policy of the server does the same, so that no server is started with it."""
    in_brief: ClassVar[bool] = True
    """Whether short tables and pictures show it: it is a rival of a code, and no bound."""
    version: ClassVar[int] = 1
    """Of its part and how that is trained: rows and trainings of another version do not count."""
    file: str = ""
    """The file of a user's own method."""
    digest: str = ""
    """Of that file, with the class: a method that was changed is trained and measured again."""

    def encode(self, parity: int, images: Tensor) -> Tensor:
        """Return the query (B, C, H, W) of one parity.

        Args:
            parity: its number, from 0.
            images: a group's members (B, m, C, H, W), floats in 0..1.
        """
        raise NotImplementedError(f"{self.name} encodes nothing")

    def decode(
        self, member: int, answers: Mapping[int, Tensor], parities: Mapping[int, Tensor], size: int
    ) -> Tensor:
        """Return the scores (B, classes) of a missing member.

        It is asked for no more missing members than there are parities' outputs. Scores are logits:
        the softmax comes after decoding.

        Args:
            member: its position in the group, from 0.
            answers: position -> scores (B, classes), of the members that answered.
            parities: number -> what the model returned for that parity, (B, classes).
            size: the members of the group.
        """
        raise NotImplementedError(f"{self.name} decodes nothing")

    def rules(self, k: int, stragglers: int = 1, bundle: BundleInfo | None = None) -> CodeRules:
        """Return its rules: a part that was trained for parities serves groups of k only.

        Args:
            k: the most queries in a group.
            stragglers: how many missing outputs to make up for, where that can be chosen.
            bundle: the bundle that it is made around, if that is known.
        """
        model = PARITY_MODEL if self.part else SERVED
        return Parities(k, self.parities, fixed_size=bool(self.part), model=model)

    def build(self, given: Given) -> Scheme:
        """Make the code and its models.

        Raises:
            UserError: if they cannot be made of what is given.
        """
        models = {} if given.part is None else {PARITY_MODEL: given.part}
        rules = self.rules(given.k, given.stragglers, given.bundle)
        return self.scheme(MethodCode(self, rules), given, **models)

    def check(self, k: int, shape: tuple[int, ...], bundle: BundleInfo | None) -> None:
        """Refuse a group size, an image shape or a bundle that it cannot serve.

        Raises:
            UserError: one line.
        """
        check_k(k)

    @property
    def tuned(self) -> bool:
        """Whether `tune` chooses something on validation images."""
        return type(self).tune is not Method.tune

    def versions(self) -> Mapping[str, Any]:
        """Return what a row's settings, and a part's, state of versions; nothing of the first."""
        return {"version": self.version} if self.version > 1 else {}

    def identity(self) -> Mapping[str, Any]:
        """Return what tells it from what had its name before: its versions, and its file's digest.

        It is empty for a method of ours that never changed.
        """
        return {**self.versions(), **({"digest": self.digest} if self.digest else {})}

    def made_with(self, given: Given, settings: Any) -> Mapping[str, Any]:
        """Return what else its part depends on, for the header of the part's file."""
        return {}

    def untrained(self, given: Given, made_with: Mapping[str, Any]) -> nn.Module:
        """Return its part before the training.

        Args:
            given: what the method is made of, without a part.
            made_with: what `made_with` returned, with what else the part's header says (method,
                base, k, digests).
        """
        raise NotImplementedError(f"{self.name} has no trained part")

    def loss(self, part: Callable[[Tensor], Tensor], batch: Batch) -> Tensor:
        """Return the loss of its part.

        It is trained on groups if its task is encoded, and else on single images, m = 1.

        Args:
            part: computes the part's outputs, float32 whatever the training's precision.
            batch: images, with the teacher's answers to them.
        """
        raise NotImplementedError(f"{self.name} has no trained part")

    def tune(self, given: Given, groups: Tensor, labels: Tensor) -> Mapping[str, Any]:
        """Return what it chooses on validation images, as its row states it.

        Args:
            given: what the method is made of.
            groups: images (G, k, C, H, W), uint8 in 0 to 255.
            labels: (G, k) int64.
        """
        raise NotImplementedError(f"{self.name} chooses nothing")

    @classmethod
    def lacking(cls) -> list[str]:
        """Return the names that the class must still define."""
        needed = ["name", *(("decode", "encode") if cls.build is Method.build else ())]
        needed += ("loss", "untrained") if cls.part else ()
        return sorted(n for n in needed if getattr(cls, n, None) is getattr(Method, n, None))

    def scheme(self, code: Code, given: Given, **models: nn.Module) -> Scheme:
        """Return a scheme of a code and models by role; the served one is the classifier."""
        own = {SERVED: given.classifier, **models}
        return Scheme(self.name, code, own, given.shape, given.chosen, given.classes)
