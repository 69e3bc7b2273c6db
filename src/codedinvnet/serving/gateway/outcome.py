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
PARAMETERS = re.compile(rb'(?<!\\)"parameters"\s*:\s*(?:\{\s*|null)')
"""Up to where an answer's own begin; or with null, which KServe's server writes in their place."""
TOKENS = re.compile(rb'"[^"\\]*(?:\\.[^"\\]*)*"|\[|\]|\{|\}', re.DOTALL)
"""What tells the depth of a place in JSON. Single bytes are found twice as fast as a class."""
NEAR = 1 << 16
"""Bytes in which an answer's outputs must begin. Clients choose the id before them."""
MOST_BEHIND = 1 << 20
"""Bytes of outputs in JSON behind which parameters are looked for, on the event loop."""
SIZE = re.compile("[0-9]{1,18}")
"""What a header may say of the size of the JSON part."""


def with_outcome(reply: Reply, outcome: str, told: Mapping[str, float] = {}) -> Reply:
    """Return a successful HTTP answer with its outcome as a header and as a parameter.

    An answer has the header alone if it is compressed, or no JSON object. So has one whose outputs
    begin late, or whose parameters stand behind long outputs. An answer that tells its outcome
    already, as another gateway's, stays as it is.

    Args:
        reply: the answer.
        outcome: how it came about.
        told: further parameters.
    """
    found = dict(reply.headers)
    if OUTCOME_HEADER in found:
        return reply
    headers: Headers = (*reply.headers, (OUTCOME_HEADER, outcome))
    packed = found.get("content-encoding", "identity") != "identity"
    if reply.status != 200 or packed:
        return Reply("http", reply.status, reply.body, headers)
    length = HEADER_LENGTH.lower()
    stated = SIZE.fullmatch(found.get(length, ""))
    size = int(stated.group()) if stated else len(reply.body)
    begin, end, text = _insertion(reply.body, size, {"outcome": outcome, **told})
    if not text:
        return Reply("http", reply.status, reply.body, headers)
    view = memoryview(reply.body)  # the answer may be large: only the new one is a copy
    body = b"".join([view[:begin], text, view[end:]])
    if stated:
        grown = str(size + len(body) - len(reply.body))
        headers = tuple((name, grown if name == length else value) for name, value in headers)
    return Reply("http", reply.status, body, headers)


def _insertion(body: bytes, size: int, told: Mapping[str, Any]) -> tuple[int, int, bytes]:
    """Return which part of an answer's JSON gives way to a text, and that; "" if it is no JSON.

    Args:
        body: the JSON, and maybe tensors behind it.
        size: of the JSON.
        told: what the text tells.
    """
    outputs = OUTPUTS.search(body, 0, NEAR)
    if outputs is None or not body.startswith(b"{"):
        return 0, 0, b""
    own = PARAMETERS.search(body, 0, outputs.start())
    if own is None and _names_parameters(body, outputs.end(), size):
        if size - outputs.end() > MOST_BEHIND:
            return 0, 0, b""
        own = _behind(body, outputs.end(), size)
    entry = b",".join(b'"%b":%b' % (name.encode(), to_json(value)) for name, value in told.items())
    if own is None:
        return 1, 1, b'"parameters":{%b},' % entry
    end = own.end()
    if own.group().endswith(b"null"):
        return end - len(b"null"), end, b"{%b}" % entry
    return end, end, entry + (b"" if body[end : end + 1] == b"}" else b",")


def _names_parameters(body: bytes, begin: int, end: int) -> bool:
    """Tell whether a part of an answer may have parameters; most of it are digits.

    The last m is found much faster than the word, which can be no further.
    """
    last = body.rfind(b"m", begin, end)
    return body.find(b'"parameters"', begin, min(end, last + len('meters"'))) >= 0


def _behind(body: bytes, begin: int, end: int) -> re.Match[bytes] | None:
    """Return the beginning of an answer's own parameters behind its outputs, which have others."""
    depth = 1
    for token in TOKENS.finditer(body, begin, end):
        found = token.group()
        if found in b"{[":
            depth += 1
        elif found in b"}]":
            depth -= 1
        elif depth == 1 and (own := PARAMETERS.match(body, token.start(), end)):
            return own
    return None


def own_outcome(headers: Headers) -> Headers:
    """Return, of headers or metadata, what an upstream says of its answer's outcome."""
    return tuple(header for header in headers if header[0] == OUTCOME_HEADER)


def outcome_field(outcome: str, told: Mapping[str, float] = {}) -> bytes:
    """Return what, appended to a serialized ModelInferResponse, makes parameters of these."""
    from codedinvnet.serving.faces.grpc_stubs import pb
    from codedinvnet.serving.faces.v2_grpc import set_parameters

    response = pb.ModelInferResponse()
    set_parameters(response.parameters, {"outcome": outcome, **told})
    message: bytes = response.SerializeToString()
    return message
