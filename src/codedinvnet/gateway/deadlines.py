"""Deadlines that clients state, and that upstreams are told of, less the time that is gone."""

from __future__ import annotations

import re

from codedinvnet.net.http1 import RequestHead

MILLISECONDS, SECONDS = b"x-envoy-upstream-rq-timeout-ms", b"x-request-timeout"
_number = re.compile(rb"\d{1,9}(?:\.\d{1,9})?")


def stated(head: RequestHead) -> dict[bytes, float]:
    """Return the seconds after which a client waits no longer, by the field that says so."""
    found = {}
    for name, unit in ((MILLISECONDS, 0.001), (SECONDS, 1.0)):
        text = head.known.get(name)
        if text is not None and _number.fullmatch(text) and float(text):
            found[name] = unit * float(text)
    return found


def written(deadlines: dict[bytes, float], gone: float) -> bytes:
    """Return the fields that tell an upstream, each with its line's end, after some seconds."""
    lines = []
    for name, seconds in deadlines.items():
        left = max(0.001, seconds - gone)
        text = b"%d" % round(1000 * left) if name == MILLISECONDS else b"%.3f" % left
        lines.append(b"%b: %b\r\n" % (name, text))
    return b"".join(lines)
