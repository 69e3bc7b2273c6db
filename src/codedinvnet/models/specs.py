"""What a model's own description of its tensors says: inputs, and whether batches are free."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from codedinvnet.common.errors import UserError
from codedinvnet.models.base import DATATYPES, TensorSpec


@dataclass(frozen=True)
class Declared:
    """An input as a file declares it.

    Attributes:
        name: the model's own name of it.
        datatype: one of DATATYPES, or the file's own word for one that the protocol lacks.
        axes: their sizes; the name of one that is free.
    """

    name: str
    datatype: str
    axes: tuple[int | str, ...]


def parse_input(text: str) -> TensorSpec:
    """Read an input as a user writes it, NAME:DATATYPE:SHAPE, such as `x:FP32:3x32x32`."""
    name, datatype, shape = [*text.rsplit(":", 2), "", ""][:3]
    if not name or datatype not in DATATYPES:
        raise UserError(
            f"input {text!r} is not NAME:DATATYPE:SHAPE, such as images:FP32:3x32x32, with a "
            f"datatype of {', '.join(DATATYPES)}"
        )
    sizes = shape.split("x") if shape else []
    if not all(size.isdecimal() and int(size) > 0 for size in sizes):
        raise UserError(f"input {text!r}: {shape!r} is no shape of one query, such as 3x32x32")
    return TensorSpec(name, datatype, tuple(int(size) for size in sizes))


def check_told(told: Sequence[TensorSpec], names: Sequence[str], where: str) -> None:
    """Refuse inputs that a user told of and the model does not have."""
    for spec in told:
        if spec.name not in names:
            raise UserError(
                f"inputs: {where} has no input {spec.name!r}: its inputs are {', '.join(names)}"
            )


def input_specs(
    declared: Sequence[Declared], told: Sequence[TensorSpec], where: str
) -> tuple[tuple[TensorSpec, ...], int | None]:
    """Return the inputs of one query, and how many queries the model takes at once.

    The batch is the first axis of every input. It is free, or of size 1.
    """
    if not declared:
        raise UserError(f"{where} has no input")
    check_told(told, [value.name for value in declared], where)
    known = {spec.name: spec for spec in told}
    specs = tuple(_input_spec(value, known, where) for value in declared)
    firsts = {value.name: value.axes[0] for value in declared}
    free = {name for name, size in firsts.items() if isinstance(size, str)}
    if free and len(free) < len(firsts):
        fixed = next(name for name in firsts if name not in free)
        raise UserError(f"{where}: input {fixed!r} has no free batch axis, though others have")
    return specs, None if free else 1


def _input_spec(value: Declared, told: Mapping[str, TensorSpec], where: str) -> TensorSpec:
    place = f"{where}: input {value.name!r}"
    if value.datatype not in DATATYPES:
        raise UserError(f"{place} is {value.datatype}, which the protocol lacks")
    if not value.axes:
        raise UserError(f"{place} is a single value: it has no batch axis")
    shape = f"({', '.join(map(str, value.axes))})"
    first, rest = value.axes[0], value.axes[1:]
    if (spec := told.get(value.name)) is not None:
        fits = len(rest) == len(spec.shape) and all(
            isinstance(size, str) or size == given
            for size, given in zip(rest, spec.shape, strict=True)
        )
        if spec.datatype != value.datatype or not fits:
            raise UserError(f"input {spec.name}: {where} has {value.datatype} {shape}")
        rest = spec.shape
    free = [size for size in rest if isinstance(size, str)]
    if free and isinstance(first, str):
        raise UserError(
            f"{place} has several axes of no fixed size, any of which may be the batch: {shape}; "
            f"give the shape of one query as the input {value.name}:{value.datatype}:SHAPE"
        )
    if free:
        raise UserError(f"{place} is {shape}: the free axis must come first, and be the batch")
    if isinstance(first, int) and first != 1:
        raise UserError(
            f"{place} is {shape}: its first axis must be a free batch, or a batch of 1, not {first}"
        )
    return TensorSpec(value.name, value.datatype, tuple(int(size) for size in rest))
