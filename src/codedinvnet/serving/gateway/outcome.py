"""Tells how an answer came about, in the answer itself; its tensors stay as they are."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from pydantic_core import to_json

from codedinvnet.models.base import HEADER_LENGTH
from codedinvnet.serving.faces.v2 import OUTCOME_HEADER
from codedinvnet.serving.gateway.calls import Headers, Reply

OUTPUTS = re.compile(rb'(?<!\\)"outputs"\s*:')
PARAMETERS = re.compile(rb'(?<!\\)"parameters"\s*:\s*\{\s*')


def with_outcome(reply: Reply, outcome: str, told: Mapping[str, float] = {}) -> Reply:
    """Return a successful HTTP answer with its outcome as a header and as a parameter.

    A compressed answer, and one that is no JSON object, has the header alone.

    Args:
        reply: the answer.
        outcome: how it came about.
        told: further parameters.
    """
    headers: Headers = (*reply.headers, (OUTCOME_HEADER, outcome))
    found = dict(reply.headers)
    packed = found.get("content-encoding", "identity") != "identity"
    if reply.status != 200 or packed:
        return Reply("http", reply.status, reply.body, headers)
    place, text = _insertion(reply.body, {"outcome": outcome, **told})
    if not text:
        return Reply("http", reply.status, reply.body, headers)
    body = b"".join([reply.body[:place], text, reply.body[place:]])
    length = HEADER_LENGTH.lower()
    if found.get(length, "").isdigit():
        headers = tuple(
            (name, str(int(value) + len(text)) if name == length else value)
            for name, value in headers
        )
    return Reply("http", reply.status, body, headers)


def _insertion(body: bytes, told: Mapping[str, Any]) -> tuple[int, bytes]:
    """Return where text is inserted into an answer's JSON, and which; "" if it is none."""
    outputs = OUTPUTS.search(body)
    if outputs is None or not body.startswith(b"{"):
        return 0, b""
    own = PARAMETERS.search(body, 0, outputs.start())
    entry = b",".join(b'"%b":%b' % (name.encode(), to_json(value)) for name, value in told.items())
    if own is None:
        return 1, b'"parameters":{%b},' % entry
    following = b"" if body[own.end() : own.end() + 1] == b"}" else b","
    return own.end(), entry + following


def outcome_field(outcome: str, told: Mapping[str, float] = {}) -> bytes:
    """Return what, appended to a serialized ModelInferResponse, makes parameters of these."""
    from codedinvnet.serving.faces.grpc_stubs import pb
    from codedinvnet.serving.faces.v2_grpc import set_parameters

    response = pb.ModelInferResponse()
    set_parameters(response.parameters, {"outcome": outcome, **told})
    message: bytes = response.SerializeToString()
    return message
