"""Parameters of requests: which may be repeated by an answer, and which mean nothing here."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any

from codedinvnet.serving.answers import BadRequest

DEEPEST = 32
"""Levels of lists and objects in what an answer repeats."""
MOST_PARAMETERS = 64 * 1024
"""Characters of a request's parameters, which its answer repeats."""
KNOWN = frozenset(
    {"accept_decoded", "max_disagreement", "binary_data_output", "timeout", "priority"}
)
"""A request's parameters that no answer depends on, or that are kept here."""
KNOWN_OF_TENSORS = frozenset({"binary_data_size", "binary_data"})
"""Those of its inputs and outputs."""
USUAL = ("content_type", "np")
"""What MLServer's codecs write beside every array; it changes nothing."""
OF_SEQUENCES = frozenset({"sequence_id", "sequence_start", "sequence_end"})
"""With 0, false or an empty text they say that there is no sequence."""


def check_repeated(parameters: Mapping[str, Any]) -> None:
    """Refuse parameters that an answer cannot repeat.

    Raises:
        BadRequest: if they are long, nested deeply, or no JSON.
    """
    check_depth(parameters)
    try:
        repeated = json.dumps(parameters, allow_nan=False)
    except ValueError as error:
        raise BadRequest(f"parameters: {error}") from error
    if len(repeated) > MOST_PARAMETERS:
        raise BadRequest(f"parameters: more than {MOST_PARAMETERS} characters")


def check_depth(parameters: Mapping[str, Any]) -> None:
    """Refuse parameters that are nested so deeply that writing them again could fail.

    Raises:
        BadRequest: naming how deep they may be.
    """
    level: list[Any] = [parameters]
    for _ in range(DEEPEST):
        nested = [value for value in level if isinstance(value, dict | list)]
        if not nested:
            return
        level = [x for v in nested for x in (v.values() if isinstance(v, dict) else v)]
    if any(isinstance(value, dict | list) for value in level):
        raise BadRequest(f"parameters: nested more than {DEEPEST} deep")


def unknown(parameters: Mapping[str, Any], tensors: Iterable[Mapping[str, Any]]) -> tuple[str, ...]:
    """Return the names of parameters that only a model's own server may know.

    Args:
        parameters: of a request.
        tensors: those of each of its inputs and outputs.
    """
    said = [pair for pair in parameters.items() if pair[0] not in KNOWN]
    for own in tensors:
        said += (pair for pair in own.items() if pair[0] not in KNOWN_OF_TENSORS)
    return tuple(
        name
        for name, value in said
        if value is not None and (name, value) != USUAL and (value or name not in OF_SEQUENCES)
    )
