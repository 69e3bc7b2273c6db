"""Finds the first content of a stream of server-sent events.

Servers send headers, comments and empty events before they have computed anything. An event counts
once its data carries something: a chat delta with a role and no text does not.
"""

from __future__ import annotations

import json
from typing import Any

MOST_HELD = 1 << 18
"""Bytes without content after which the stream is passed on as it is."""
MOST_EVENT = 1 << 16
"""Bytes of an event's data that is read; longer ones count."""
PRELUDES = frozenset(
    {
        "ping", "keepalive", "message_start", "response.created", "response.queued",
        "response.in_progress", "response.content_part.added", "response.reasoning_part.added",
        "response.reasoning_summary_part.added",
    }
)  # fmt: skip
"""Types of events that servers of language models send before they have computed anything."""
STARTS = {"content_block_start": "content_block", "response.output_item.added": "item"}
"""Types of events that begin a part of an answer, and where they describe it."""
TEXTS = ("text", "thinking", "message", "reasoning")
"""Parts whose content follows in further events; of others, the description is content: a tool's
name."""


BROKEN = "the upstream failed in mid-stream"
ERRORS = {
    "anthropic": {"type": "error", "error": {"type": "api_error", "message": BROKEN}},
    "responses": {"type": "error", "code": "server_error", "message": BROKEN, "param": None},
    "openai": {"error": {"message": BROKEN, "type": "server_error", "param": None, "code": None}},
}
"""What the events that tell of an error say, by API."""


class FirstContent:
    """Reads a stream of events until one carries something, or tells of an error.

    Attributes:
        is_error: whether it told of an error.
        api: whose events these are, one of `ERRORS`; "" if unknown.
    """

    __slots__ = ("_data", "_line", "_name", "_size", "api", "is_error")

    def __init__(self) -> None:
        self.is_error, self.api = False, ""
        self._line = self._name = b""
        self._data: list[bytes] = []
        self._size = 0

    def feed(self, data: bytes) -> bool:
        """Take a part of the stream in; return whether content is here."""
        self._size += len(data)
        if self._size > MOST_HELD:
            return True
        lines = (self._line + data).replace(b"\r\n", b"\n").replace(b"\r", b"\n").split(b"\n")
        self._line = lines.pop()
        for line in lines:
            if line.startswith(b"data:"):
                self._data.append(line[5:].removeprefix(b" "))
            elif line.startswith(b"event:"):
                self._name = line[6:].strip()
            elif not line:
                name, self._name = self._name.decode("latin-1"), b""
                event, self._data = b"\n".join(self._data), []
                if not self.api:
                    self.api = api_of(name, event)
                if name not in PRELUDES and carries_content(event):
                    self.is_error = name == "error" or tells_of_error(event)
                    return True
        return False


def api_of(name: str, data: bytes) -> str:
    """Return the API of an event, by its name or what it has; "" if unknown."""
    if name == "message_start" or b'"message_start"' in data:
        return "anthropic"
    if name.startswith("response.") or b'"response.created"' in data:
        return "responses"
    return "openai" if b'"choices"' in data else ""


def error_event(api: str) -> bytes:
    """Return the event by which an API's clients learn that a stream is broken; b"" if unknown."""
    if api not in ERRORS:
        return b""
    name = b"" if api == "openai" else b"event: error\n"
    return b"%bdata: %b\n\n" % (name, json.dumps(ERRORS[api]).encode())


def tells_of_error(data: bytes) -> bool:
    """Return whether the data of an event with content is an error."""
    if b"error" not in data and b"failed" not in data:
        return False
    try:
        event = json.loads(data[:MOST_EVENT])
    except (ValueError, RecursionError):
        return False
    if not isinstance(event, dict):
        return False
    return bool(event.get("error")) or event.get("type") in ("error", "response.failed")


def carries_content(data: bytes) -> bool:
    """Return whether an event's data says more than that an answer is being computed."""
    if not data.strip():
        return False
    if len(data) > MOST_EVENT or not data.startswith(b"{"):
        return True
    try:
        event = json.loads(data)
    except (ValueError, RecursionError):
        return True
    if not isinstance(event, dict):
        return True
    kind = str(event.get("type", ""))
    if event.get("error"):
        return True
    if kind in PRELUDES:
        return False
    if kind in STARTS:
        part = event.get(STARTS[kind])
        return not isinstance(part, dict) or part.get("type") not in TEXTS
    if kind and "delta" in event:  # Anthropic's messages, and responses
        return _is_filled(event["delta"], "type")
    if "content" in event and "stop" in event:  # llama.cpp's own API
        return bool(event["content"] or event["stop"] or event.get("tokens"))
    choices = event.get("choices")
    if not isinstance(choices, list):
        return True
    return any(map(_says_something, choices)) or bool(not choices and event.get("usage"))


def _says_something(choice: Any) -> bool:
    if not isinstance(choice, dict):
        return True
    if any(choice.get(key) for key in ("finish_reason", "text", "token_ids")):
        return True
    if isinstance(choice.get("delta"), dict):
        return _is_filled(choice["delta"], "role")
    return "text" not in choice


def _is_filled(delta: Any, label: str) -> bool:
    """Return whether a change of an answer has more in it than a label."""
    if isinstance(delta, dict):
        return any(value for key, value in delta.items() if key != label)
    return bool(delta)
