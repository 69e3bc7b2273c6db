"""Which requests wait for which, where all upstreams are busy."""

from __future__ import annotations

from codedinvnet.scheduler.events import HIGH, LOW, NORMAL

FIELD = "x-priority"
NAMES = {"high": HIGH, "normal": NORMAL, "low": LOW}
_names = {number: name for name, number in NAMES.items()}


def read_priority(text: str) -> int:
    """Return the priority that has a name.

    Raises:
        ValueError: if none has.
    """
    if text not in NAMES:
        raise ValueError(f"must be one of {', '.join(NAMES)}, got {text!r}")
    return NAMES[text]


def granted(said: str, usual: int, is_trusted: bool) -> int:
    """Return a request's priority: anybody may ask for less than usual, who is trusted for more."""
    asked = NAMES.get(said.lower(), usual)
    return asked if is_trusted else max(asked, usual)


def name_of(priority: int) -> str:
    """Return the name of a priority."""
    return _names[priority]
