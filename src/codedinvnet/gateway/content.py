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
        "ping", "message_start", "content_block_start", "response.created", "response.queued",
        "response.in_progress", "response.output_item.added", "response.content_part.added",
    }
)  # fmt: skip
"""Types of events that large language models' servers send before any text."""


class FirstContent:
    """Reads a stream of events until one carries something."""

    __slots__ = ("_data", "_line", "_size")

    def __init__(self) -> None:
        self._line = b""
        self._data: list[bytes] = []
        self._size = 0

    def feed(self, data: bytes) -> bool:
        """Take a part of the stream in, and tell whether content is here."""
        self._size += len(data)
        if self._size > MOST_HELD:
            return True
        lines = (self._line + data).replace(b"\r\n", b"\n").replace(b"\r", b"\n").split(b"\n")
        self._line = lines.pop()
        for line in lines:
            if line.startswith(b"data:"):
                self._data.append(line[5:].removeprefix(b" "))
            elif not line and self._data:
                event, self._data = b"\n".join(self._data), []
                if carries_content(event):
                    return True
        return False


def carries_content(data: bytes) -> bool:
    """Tell whether an event's data says more than that an answer is being computed."""
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
    if event.get("type") in PRELUDES:
        return False
    choices = event.get("choices")
    if not isinstance(choices, list):
        return True
    return any(map(_says_something, choices)) or bool(not choices and event.get("usage"))


def _says_something(choice: Any) -> bool:
    if not isinstance(choice, dict) or choice.get("finish_reason") or choice.get("text"):
        return True
    delta = choice.get("delta")
    if not isinstance(delta, dict):
        return "text" not in choice
    return any(value for key, value in delta.items() if key != "role")
