"""Requests that must not be sent twice, or to any server: the gateway refuses them.

They are found without parsing them. What is damaged is for its server to refuse.
"""

from __future__ import annotations

import re
from itertools import islice

from codedinvnet.models.base import HEADER_LENGTH
from codedinvnet.serving.answers import BadRequest
from codedinvnet.serving.faces.protobuf import fields
from codedinvnet.serving.gateway.calls import MOST_FIELDS, Headers, Transport
from codedinvnet.serving.service import Request

STATEFUL = (
    "sequence_id: all requests of a sequence must go to one server, and each once: ask that itself"
)
SHARED = (
    "shared_memory_region: a second copy of the request would write there late: send and take the "
    "tensors themselves"
)
"""Why such requests are refused."""
SEQUENCE_ID = "sequence_id"
SEQUENCE_KEY, REGION_KEY = b'"sequence_id"', b'"shared_memory_region"'
SEQUENCE = re.compile(SEQUENCE_KEY + rb'\s*:(?!\s*(?:0\s*[,}]|""))')
"""A request's parameter in JSON, unless it is that of no sequence."""
REGION = re.compile(REGION_KEY + rb"\s*:")
"""A tensor's parameter in JSON."""
PARAMETERS, INPUTS, OUTPUTS = 4, 5, 6
"""Fields of a ModelInferRequest."""
SEQUENCE_ENTRY, NO_SEQUENCE = b"\x0a\x0bsequence_id", (b"\x12\x02\x10\x00", b"\x12\x02\x1a\x00")
"""How that parameter's entry begins, and how it ends of no sequence: with 0, or an empty text."""
REGION_ENTRY = b"\x0a\x14shared_memory_region"
"""How the entry of a tensor's parameter begins."""


class Unrepeatable(BadRequest):
    """A request must not be sent twice."""


def check_repeatable(transport: Transport, body: bytes, headers: Headers) -> None:
    """Refuse a request of a sequence, whose server keeps a state, or with shared memory.

    What is packed is not looked into.

    Raises:
        Unrepeatable: if it is one; it says why.
    """
    try:
        why = _in_message(body) if transport == "grpc" else _in_json(body, headers)
    except ValueError:
        return
    if why:
        raise Unrepeatable(why)


def _in_json(body: bytes, headers: Headers) -> str:
    length = dict(headers).get(HEADER_LENGTH.lower(), "")
    head = body[: int(length)] if length.isdecimal() else body
    if _names(head, SEQUENCE_KEY, b"q") and SEQUENCE.search(head):
        return STATEFUL
    return SHARED if _names(head, REGION_KEY, b"g") and REGION.search(head) else ""


def _names(head: bytes, key: bytes, rare: bytes) -> bool:
    """Tell whether JSON has a key, which can be no further than the last of a byte in it.

    Most bodies are digits: a byte that few of them have is looked for much faster than the key.
    """
    last = head.rfind(rare)
    return last >= 0 and head.find(key, 0, last + len(key)) >= 0


def _in_message(body: bytes) -> str:
    for number, begin, end in islice(fields(body), MOST_FIELDS):
        if number > OUTPUTS:  # every implementation writes fields in their order
            return ""
        if number == PARAMETERS and body.startswith(SEQUENCE_ENTRY, begin, end):
            if not body.endswith(NO_SEQUENCE, begin, end):
                return STATEFUL
        elif number in (INPUTS, OUTPUTS) and body.find(REGION_ENTRY, begin, end) >= 0:
            return SHARED  # or a text has these bytes, of typed contents: nobody writes such
    return ""


def refuse_sequences(request: Request) -> None:
    """Refuse a request of a sequence, whose queries a code would mix with others'.

    Raises:
        Unrepeatable: if it is one.
    """
    if request.parameters.get(SEQUENCE_ID):
        raise Unrepeatable(STATEFUL)
