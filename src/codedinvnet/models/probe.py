"""What is learnt of a model by running it: its outputs, and where its class scores are."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple, TypeAlias, cast

import numpy as np

from codedinvnet.common.errors import UserError, one_line
from codedinvnet.models.base import DATATYPE_OF, DATATYPES, Scores, TensorSpec, can_be_scores

Arrays: TypeAlias = "dict[str, np.ndarray]"
Compute: TypeAlias = Callable[[Mapping[str, np.ndarray]], Arrays]
"""Runs one batch, of no more queries than the model takes at once."""


class Opened(NamedTuple):
    """A model that was opened, before it is run."""

    inputs: tuple[TensorSpec, ...]
    max_batch: int | None
    platform: str
    digest: str
    """Of what answers depend on: files, or weights."""
    compute: Compute
    network: Any = None
    """The module whose outputs have gradients; None if PyTorch does not compute the model."""


ROWS = 4
"""Queries of a probe."""
_KINDS = ("logits", "probabilities")
_TOLERANCE = 1e-2
"""Share of the largest value by which sums may differ that are rounded in another order."""


class Probed(NamedTuple):
    """What the runs showed."""

    outputs: tuple[TensorSpec, ...]
    max_batch: int | None
    answers: Arrays
    """Name -> (ROWS, *shape)."""


def probe_inputs(inputs: tuple[TensorSpec, ...]) -> Arrays:
    """Return queries that most models take: floats and pixels of any value, integers 0 and 1."""
    generator = np.random.default_rng(0)
    found = {}
    for spec in inputs:
        size, dtype = (ROWS, *spec.shape), DATATYPES[spec.datatype]
        if spec.datatype == "BYTES":
            found[spec.name] = np.full(size, b"", dtype=object)
        elif dtype.kind == "f":
            found[spec.name] = generator.random(size, np.float32).astype(dtype)
        else:  # the words of a small vocabulary, and masks
            found[spec.name] = generator.integers(
                256 if spec.datatype == "UINT8" else 2, size=size
            ).astype(dtype)
    return found


def in_turn(compute: Compute, inputs: Mapping[str, np.ndarray], at_once: int | None) -> Arrays:
    """Compute a batch, so many queries at once."""
    size = len(next(iter(inputs.values())))
    if at_once is None or size <= at_once:
        return compute(inputs)
    parts = [
        compute({name: array[begin : begin + at_once] for name, array in inputs.items()})
        for begin in range(0, size, at_once)
    ]
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def probe(
    compute: Compute, inputs: tuple[TensorSpec, ...], max_batch: int | None, where: str
) -> Probed:
    """Run a model on one query and on ROWS, and tell what it returns.

    A model that raises on several queries takes one at a time.
    """
    queries = probe_inputs(inputs)
    one = {name: array[:1] for name, array in queries.items()}
    try:
        alone = compute(one)
    except UserError:
        raise
    except Exception as error:  # whatever the model raises
        raise UserError(f"{where} fails on a query: {one_line(error)}") from error
    if not alone:
        raise UserError(f"{where} returns no tensor")
    outputs = tuple(_output_spec(name, array, where) for name, array in alone.items())
    together: Arrays = {}
    if max_batch != 1:
        try:
            together = compute(queries)
        except Exception:  # whatever the model raises
            max_batch = 1
    if max_batch == 1:
        return Probed(outputs, 1, in_turn(compute, queries, 1))
    for spec in outputs:
        found = together.get(spec.name)
        if found is None or found.shape != (ROWS, *spec.shape):
            shape = "is missing" if found is None else f"has shape {found.shape}"
            raise UserError(
                f"{where}: output {spec.name!r} {shape} for {ROWS} queries, and "
                f"{alone[spec.name].shape} for one: its first axis must be the batch"
            )
        if found.dtype.kind == "f" and differ(alone[spec.name][0], found[0], _TOLERANCE):
            # Rounding depends on how many queries there are, too: others of the same number decide.
            others = {name: array[[0] + [1] * (ROWS - 1)] for name, array in queries.items()}
            mixed = differ(found[0], compute(others)[spec.name][0], _TOLERANCE)
            drawn = not np.array_equal(alone[spec.name], compute(one)[spec.name], equal_nan=True)
            if mixed and not drawn:
                raise UserError(
                    f"{where}: output {spec.name!r} of a query depends on the other queries of its "
                    "batch"
                )
    return Probed(outputs, None, together)


def _output_spec(name: str, array: np.ndarray, where: str) -> TensorSpec:
    datatype = DATATYPE_OF.get(array.dtype)
    if datatype is None:
        raise UserError(f"{where}: output {name!r} is {array.dtype}, which the protocol lacks")
    if array.ndim == 0 or len(array) != 1:
        raise UserError(
            f"{where}: output {name!r} has shape {array.shape} for one query: it has no batch axis"
        )
    return TensorSpec(name, datatype, array.shape[1:])


def differ(wanted: np.ndarray, found: np.ndarray, tolerance: float) -> bool:
    """Tell whether numbers differ by more than a share of the largest finite one that is wanted."""
    scale = float(np.abs(wanted[np.isfinite(wanted)]).max(initial=0.0))
    return not np.allclose(wanted, found, rtol=0, atol=tolerance * scale + 1e-6, equal_nan=True)


def find_scores(told: str | None, probed: Probed, where: str) -> Scores | None:
    """Return which output holds the class scores, and what they are.

    Args:
        told: the user's `NAME[:probabilities|:logits]`.
        probed: what the runs showed.
        where: the model, for messages.

    Returns:
        None if it was not told, and not exactly one output can be scores.
    """
    candidates = [spec.name for spec in probed.outputs if can_be_scores(spec)]
    if told is None:
        answers = probed.answers[candidates[0]] if len(candidates) == 1 else np.zeros(1)
        if (answers == answers[:1]).all():  # they do not depend on the query
            return None
        return Scores(candidates[0], kind_of_scores(answers))
    name, _, kind = told.rpartition(":")
    if kind not in _KINDS:
        name, kind = told, ""
    if name not in candidates:
        outputs = (
            f"{spec.name} is {spec.datatype} ({', '.join(map(str, ('B', *spec.shape)))})"
            for spec in probed.outputs
        )
        raise UserError(
            f"scores: {name!r} is no output of {where} that has scores, which are floats "
            f"(B, classes) of two classes or more: {', '.join(outputs)}"
        )
    answers = probed.answers[name]  # the same for all, perhaps: of trees that split beyond 0..1
    if kind == "probabilities" and len(finite_rows(answers)) and kind_of_scores(answers) != kind:
        raise UserError(
            f"scores: output {name!r} of {where} holds no probabilities: its rows do not sum to "
            "1, or leave 0..1"
        )
    return Scores(name, cast(Literal["logits", "probabilities"], kind or kind_of_scores(answers)))


def finite_rows(answers: np.ndarray) -> np.ndarray:
    """Return the answers (B, n) that are finite as a whole, as float64."""
    rows: np.ndarray = answers[np.isfinite(answers).all(axis=1)].astype(np.float64)
    return rows


def kind_of_scores(answers: np.ndarray) -> Literal["logits", "probabilities"]:
    """Return what scores (B, classes) are, by the finite ones; without any they are logits."""
    rows = finite_rows(answers)
    sums = np.allclose(rows.sum(1), 1, atol=1e-2 if answers.dtype == np.float16 else 1e-3)
    likely = len(rows) > 0 and sums and rows.min() >= 0 and rows.max() <= 1
    return "probabilities" if likely else "logits"
