"""Which requests may be sent to two upstreams, and by which key the delay of copies is learnt."""

from __future__ import annotations

import math
import re
import time
from collections.abc import Callable, Sequence
from fnmatch import translate
from typing import Any, NamedTuple
from urllib.parse import unquote_to_bytes

from prometheus_client import Counter

from codedinvnet.common.errors import UserError
from codedinvnet.gateway.history import History
from codedinvnet.gateway.metrics import GatewayMetrics, RollingQuantiles
from codedinvnet.gateway.priority import read_priority
from codedinvnet.gateway.proof import Arm, Proof
from codedinvnet.net.http1 import RequestHead
from codedinvnet.net.logs import log_event
from codedinvnet.net.requests import beginning
from codedinvnet.scheduler.events import NORMAL
from codedinvnet.scheduler.settings import hang_limit

V2 = "POST /v2/models/"
V2_GRPC = "/inference.GRPCInferenceService/"
_GRPC = "ModelInfer ModelMetadata ModelReady ServerLive ServerMetadata ServerReady"
REPEATABLE = (
    *("GET *", "HEAD *"),
    *(f"{V2}*/infer", "POST /v1/models/*:predict"),
    *("POST /predictions/*", "POST /invocations"),
    *("POST /v1/embeddings", "POST /v1/rerank"),
    *(f"POST {V2_GRPC}{method}" for method in _GRPC.split()),
)
"""Built in: these only compute an answer."""
OTHERS = "other"
"""The route of requests that must not be repeated."""
EXPECTED = (
    *(("direct", 200), ("direct", 500), ("failed", 500), ("deadline", 500), ("aborted", 200)),
    *(("refused", 400), ("refused", 500)),
)
"""How requests may end, and with which status, that each route is expected to see."""
MOST_NAMED = 64
"""Paths of a glob that have a key of their own; further ones share the glob's."""
NAMED = re.compile(r"(?=.{1,200}\Z)(?:/[A-Za-z0-9._:@+~-]{1,64})+")
"""Paths that may have a key of their own: clients choose them, and metrics show them. Others share
the glob's."""
MOST_FOUND, LONGEST_FOUND = 1024, 256
"""Paths whose route is remembered, and bytes of the longest of them."""
MOST_HINTS = 20
"""Paths that are logged as not hedged."""
METHODS = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "QUERY", "*")
LARGE, LARGEST = 1 << 20, 64 << 20
"""Bytes of JSON beyond which only `WORDS` are looked for, which takes less time, and beyond which
nothing is: the event loop would stand still."""
HEADER_LENGTH = b"inference-header-content-length"
STATEFUL = re.compile(rb'"(?:sequence_id"\s*:(?!\s*(?:0\s*[,}]|""))|shared_memory_region"\s*:)')
"""What a V2 request must not be repeated with: a sequence, or a region that a copy would write."""
ESCAPED = re.compile(rb"\\u00(?:5[Ff]|6[1-9A-Fa-f]|7[0-9Aa])")
"""A letter or underscore in JSON as no encoder writes it, unless to hide one of these words."""
WORDS = re.compile(rb'sequence_id"|shared_memory_region"')
LONGEST_WORD = 21
SUSPECT = (b"sequence_id", b"shared_memory_region", b"\\u00")
"""A body without any of these needs no closer look."""


class Limits(NamedTuple):
    """How long requests of a route may take, in seconds, and which wait for them."""

    deadline: float
    """Until their first content is here."""
    idle: float = 300.0
    """Without a byte of a stream."""
    delay: tuple[float, float] | None = None
    """The least and the most until a copy; None: as measured."""
    priority: int = NORMAL

    @property
    def silent(self) -> float:
        """Without an answer, until their upstream is blamed."""
        return hang_limit(1000 * self.deadline) / 1000


class Rule(NamedTuple):
    """What an operator says of requests; None: nothing."""

    method: str
    """Or "*"."""
    glob: re.Pattern[str]
    text: str
    """Method and glob."""
    is_repeatable: bool | None = None
    deadline: float | None = None
    idle: float | None = None
    delay: tuple[float, float] | None = None
    priority: int | None = None

    def fits(self, method: str, path: str) -> bool:
        """Return whether a request is meant."""
        return self.method in ("*", method) and self.glob.fullmatch(path) is not None

    def limits(self, usual: Limits) -> Limits:
        """Return the limits of its requests, which are the usual ones where it says nothing."""
        said = self.deadline, self.idle, self.delay, self.priority
        own = zip(said, usual, strict=True)
        return Limits(*(b if a is None else a for a, b in own))  # type: ignore[arg-type]


class Route:
    """Requests that take about as long, and are treated alike.

    Args:
        name: the method and the path or glob.
        is_repeatable: whether they may be sent to more than one upstream.
        limits: of their times.
        metrics: where they are counted.
        everything: the history of all routes.
    """

    def __init__(
        self,
        name: str,
        is_repeatable: bool,
        limits: Limits,
        metrics: GatewayMetrics,
        everything: History,
    ) -> None:
        self.name, self.is_repeatable, self.limits = name, is_repeatable, limits
        self.is_v2 = name.startswith(V2)
        self.latencies, self.proof = RollingQuantiles(), Proof()
        self.history, self._everything = History(), everything
        self._requests = metrics.requests
        self._outcomes: dict[tuple[str, int], Counter] = {}
        for outcome, status in EXPECTED:  # or Prometheus would miss the first of them
            self._child(outcome, status)
        self._seconds = metrics.request_seconds.labels(name)
        self._queue_seconds = metrics.queue_seconds.labels(name)
        results = "won", "lost", "refused", "held_out"
        self._hedges = {result: metrics.hedges.labels(name, result) for result in results}
        self.hedge_counts = dict.fromkeys(self._hedges, 0)

    def answered(self, now: float, seconds: float, arm: Arm) -> None:
        """Take in how long a request waited for its first content."""
        self._seconds.observe(seconds)
        self.latencies.add(seconds)
        self.waited(now, seconds, arm)

    def waited(self, now: float, seconds: float, arm: Arm) -> None:
        """Take in how long a request waited for its first content, or in vain."""
        self.proof.add(now, seconds, arm)
        self.history.waited(now, seconds, arm)
        self._everything.waited(now, seconds, arm)

    def queued(self, seconds: float) -> None:
        """Take in how long a request waited for an upstream."""
        self._queue_seconds.observe(seconds)

    def hedged(self, result: str) -> None:
        """Count a copy that won or lost, or a late request that got none."""
        self._hedges[result].inc()
        self.hedge_counts[result] += 1

    def count(self, outcome: str, status: int) -> None:
        """Count how a request ended, and the class of the status that its client got; 0: none."""
        child = self._outcomes.get((outcome, status // 100)) or self._child(outcome, status)
        child.inc()
        now = time.monotonic()
        self.history.ended(now, self.name, outcome, status)
        self._everything.ended(now, self.name, outcome, status)

    def _child(self, outcome: str, status: int) -> Counter:
        name = f"{status // 100}xx" if status else "none"
        child = self._outcomes[outcome, status // 100] = self._requests.labels(
            self.name, outcome, name
        )
        return child


class Routes:
    """Finds requests' routes.

    Args:
        rules: what the operator says of requests; the first that fits counts.
        metrics: where they are counted.
        limits: of the times of requests of which no rule says more.
    """

    def __init__(self, rules: Sequence[Rule], metrics: GatewayMetrics, limits: Limits) -> None:
        self._metrics, self.history = metrics, History()
        self._built_in = [read_rule(text, "") for text in REPEATABLE]
        self._hints = MOST_HINTS
        self.unread = Route("unread", False, limits, metrics, self.history)
        """Counts requests that are refused by what their heads say."""
        self.change(rules, limits)

    def change(self, rules: Sequence[Rule], limits: Limits) -> None:
        """Find routes by other rules from now on; requests that have a route keep it."""
        self._rules, self._limits = rules, limits
        self._routes: dict[tuple[str, bool, Limits], Route] = {}
        self._found: dict[tuple[bytes, bytes], Route] = {}
        """What was found lately, by method and path."""

    def all(self) -> list[Route]:
        """Return the routes that requests came on."""
        return list(self._routes.values())

    def find(self, method: bytes, target: bytes) -> Route:
        """Return the route of a request."""
        path = target.partition(b"?")[0]
        route = self._found.get((method, path))
        if route is None:
            route = self._find(method, path)
            if len(self._found) >= MOST_FOUND:
                self._found.clear()
            if len(method) + len(path) <= LONGEST_FOUND:
                self._found[method, path] = route
        return route

    def _find(self, method: bytes, path: bytes) -> Route:
        plain = unquote_to_bytes(path).decode("latin-1") if b"%" in path else path.decode("latin-1")
        verb = method.decode("latin-1")
        own = next((rule for rule in self._rules if rule.fits(verb, plain)), None)
        known = next((rule for rule in self._built_in if rule.fits(verb, plain)), None)
        limits = self._limits if own is None else own.limits(self._limits)
        repeatable = known is not None
        if own is not None and own.is_repeatable is not None:
            repeatable = own.is_repeatable
        elif not repeatable:
            self._hint(f"{verb} {plain[:200]}")
        said = own or known
        if said is None:
            return self._route(OTHERS, False, limits)
        named, text = f"{verb} {plain}", said.text
        if repeatable and named.startswith(V2):  # what is special about V2 is so under any rule
            text = f"{V2}*/infer"
        if repeatable and text.startswith("POST /") and text in REPEATABLE:
            few = len(self._routes) < MOST_NAMED or (named, True, limits) in self._routes
            if few and NAMED.fullmatch(plain):
                text = named
        return self._route(text, repeatable, limits)

    def _hint(self, rule: str) -> None:
        """Log once for a path that no rule mentions how it would be hedged."""
        if rule.startswith("POST ") and self._hints:
            self._hints -= 1
            hint = f"if it is safe to repeat: --route '{rule} hedge=on'"
            log_event("not hedged", route=rule, hint=hint)

    def _route(self, name: str, is_repeatable: bool, limits: Limits) -> Route:
        key = name, is_repeatable, limits
        if key not in self._routes:
            self._routes[key] = Route(name, is_repeatable, limits, self._metrics, self.history)
        return self._routes[key]


def read_rule(text: str, name: str) -> Rule:
    """Return a rule, METHOD GLOB [KEY=VALUE ...].

    Raises:
        UserError: beginning with the option's name, if it is none.
    """
    method, glob, *settings = [*text.split(), "", ""]
    method = method.upper()
    if not glob.startswith(("/", "*")):
        raise UserError(f"{name}: {text!r} is not 'METHOD GLOB', such as 'POST /predict/*'")
    if method not in METHODS:
        raise UserError(f"{name}: {text!r}: the method must be one of {' '.join(METHODS)}")
    found: dict[str, Any] = {}
    for setting in filter(None, settings):
        key, _, value = setting.partition("=")
        try:
            found |= SETTINGS[key](value)
        except KeyError:
            known = ", ".join(SETTINGS)
            raise UserError(f"{name}: {text!r}: {setting!r} is none of {known}=VALUE") from None
        except ValueError as error:
            raise UserError(f"{name}: {text!r}: {key}: {error}") from error
    return Rule(method, re.compile(translate(glob)), f"{method} {glob}", **found)


def read_seconds(text: str) -> float:
    """Return a time such as 250ms, 5s or 2m in seconds.

    Raises:
        ValueError: if it is none.
    """
    found = re.fullmatch(r"(\d{1,9}(?:\.\d{1,9})?)(ms|s|m|h)", text)
    if found is None or not float(found[1]):
        raise ValueError(f"must be a time such as 250ms, 5s or 2m, got {text!r}")
    return float(found[1]) * {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0}[found[2]]


def read_hedging(text: str) -> dict[str, Any]:
    """Return what `hedge=` says.

    Raises:
        ValueError: if it is neither on, off nor a delay.
    """
    if text in ("on", "off"):
        return {"is_repeatable": text == "on"}
    least, colon, most = text.partition(":")
    if not colon:
        most = least
    elif not least and not most:
        raise ValueError("must be on, off, a time, or MIN:MAX")
    low = read_seconds(least) if least else 0.0
    high = read_seconds(most) if most else math.inf
    if low > high:
        raise ValueError(f"MIN is above MAX: {text}")
    return {"is_repeatable": True, "delay": (low, high)}


SETTINGS: dict[str, Callable[[str], dict[str, Any]]] = {
    "hedge": read_hedging,
    "deadline": lambda text: {"deadline": read_seconds(text)},
    "idle": lambda text: {"idle": read_seconds(text)},
    "priority": lambda text: {"priority": read_priority(text)},
}
"""What a rule may say, and how it is read."""


def is_stateful(head: RequestHead, body: Sequence[bytes]) -> bool:
    """Return whether a V2 inference request must not be repeated.

    Requests of a sequence change a state of their server, and a late copy would write into shared
    memory. What is packed is not looked into, and not repeated.
    """
    if b"content-encoding" in head.known:
        return True
    length = head.known.get(HEADER_LENGTH, b"")
    if length.isdigit() and len(length) < 16:
        body = beginning(body, int(length))  # tensors follow
    size = sum(map(len, body))
    if size <= LARGE:
        text = b"".join(body)
        if not any(word in text for word in SUSPECT):
            return False
        return STATEFUL.search(text) is not None or ESCAPED.search(text) is not None
    if size > LARGEST:
        return True
    end = (
        b""  # not joined: a copy would take longer than the search, and memory that is not counted
    )
    for part in body:
        seam = end + part[:LONGEST_WORD]
        if any(one.search(text) for text in (seam, part) for one in (WORDS, ESCAPED)):
            return True
        end = (end + part[-LONGEST_WORD:])[-LONGEST_WORD:]
    return False


def leaves_root(path: str) -> bool:
    """Return whether `..` in a decoded path leads above the root, out of an upstream's own path.

    Some servers take a backslash for a slash, or leave out what follows a semicolon.
    """
    depth = 0
    for segment in path.replace("\\", "/").split("/"):
        name = segment.partition(";")[0]
        depth += -1 if name == ".." else name not in ("", ".")
        if depth < 0:
            return True
    return False
