"""Which requests may be sent to two upstreams, and by which key the delay of copies is learnt."""

from __future__ import annotations

import re
from collections.abc import Sequence
from fnmatch import translate
from urllib.parse import unquote_to_bytes

from prometheus_client import Counter

from codedinvnet.common.errors import UserError
from codedinvnet.gateway.metrics import GatewayMetrics, RollingQuantiles
from codedinvnet.net.http1 import RequestHead
from codedinvnet.net.logs import log_event

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


class Route:
    """Requests that take about as long, and are treated alike.

    Args:
        name: the method and the path or glob.
        is_repeatable: whether they may be sent to more than one upstream.
        metrics: where they are counted.
    """

    def __init__(self, name: str, is_repeatable: bool, metrics: GatewayMetrics) -> None:
        self.name, self.is_repeatable = name, is_repeatable
        self.is_v2 = name.startswith(V2)
        self.latencies = RollingQuantiles()
        self._requests = metrics.requests
        self._outcomes: dict[tuple[str, int], Counter] = {}
        self._seconds = metrics.request_seconds.labels(name)
        self._hedges = {
            result: metrics.hedges.labels(name, result) for result in ("won", "lost", "refused")
        }
        self.hedge_counts = dict.fromkeys(self._hedges, 0)
        self.sizes: dict[int, int] = {}
        """Size class -> how many requests were of it."""

    def answered(self, seconds: float) -> None:
        """Take in how long a request waited for its first content."""
        self._seconds.observe(seconds)
        self.latencies.add(seconds)

    def hedged(self, result: str, count: int = 1) -> None:
        """Count copies that won or lost, or were refused."""
        self._hedges[result].inc(count)
        self.hedge_counts[result] += count

    def count(self, outcome: str, status: int) -> None:
        """Count how a request ended, and the class of the status that its client got; 0: none."""
        key = outcome, status // 100
        child = self._outcomes.get(key)
        if child is None:
            name = f"{status // 100}xx" if status else "none"
            child = self._outcomes[key] = self._requests.labels(self.name, outcome, name)
        child.inc()


class Routes:
    """Finds requests' routes.

    Args:
        hedge: `METHOD GLOB` of further routes whose requests may be repeated.
        no_hedge: of routes whose requests must not be, whatever else says.
        metrics: where they are counted.

    Raises:
        UserError: naming the option, if one is no such pair.
    """

    def __init__(
        self, hedge: Sequence[str], no_hedge: Sequence[str], metrics: GatewayMetrics
    ) -> None:
        rules = [(text, False, "no_hedge") for text in no_hedge]
        rules += [(text, True, "hedge") for text in hedge]
        rules += [(text, True, "") for text in REPEATABLE]
        self._rules = [(*read_rule(text, name), text, safe) for text, safe, name in rules]
        self._hints = MOST_HINTS
        self._metrics = metrics
        self._routes: dict[tuple[str, bool], Route] = {}
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
        for wanted, glob, text, is_repeatable in self._rules:
            if wanted in ("*", verb) and glob.fullmatch(plain):
                if not is_repeatable:
                    break
                named = f"{verb} {plain}"
                if named.startswith(V2):  # what is special about V2 is so under any rule
                    text = f"{V2}*/infer"
                few = len(self._routes) < MOST_NAMED or (named, True) in self._routes
                own = text.startswith("POST /") and text in REPEATABLE and few
                return self._route(named if own and NAMED.fullmatch(plain) else text, True)
        else:
            self._hint(f"{verb} {plain[:200]}")
        return self._route(OTHERS, False)

    def _hint(self, rule: str) -> None:
        """Log once for a path that no rule mentions how it would be hedged."""
        if rule.startswith("POST ") and self._hints:
            self._hints -= 1
            log_event("not hedged", route=rule, hint=f"if it is safe to repeat: --hedge '{rule}'")

    def _route(self, name: str, is_repeatable: bool) -> Route:
        key = name, is_repeatable
        if key not in self._routes:
            self._routes[key] = Route(name, is_repeatable, self._metrics)
        return self._routes[key]


def read_rule(text: str, name: str) -> tuple[str, re.Pattern[str]]:
    """Return the method and the pattern of the paths of a rule, METHOD GLOB.

    Raises:
        UserError: beginning with the option's name, if it is none.
    """
    method, _, glob = text.strip().partition(" ")
    method, glob = method.upper(), glob.strip()
    if not glob.startswith(("/", "*")) or " " in glob:
        raise UserError(f"{name}: {text!r} is not 'METHOD GLOB', such as 'POST /predict/*'")
    if method not in METHODS:
        raise UserError(f"{name}: {text!r}: the method must be one of {' '.join(METHODS)}")
    return method, re.compile(translate(glob))


def is_stateful(head: RequestHead, body: Sequence[bytes]) -> bool:
    """Tell whether a V2 inference request must not be repeated.

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


def beginning(parts: Sequence[bytes], size: int) -> list[bytes]:
    """Return the first bytes of something in parts."""
    found: list[bytes] = []
    for part in parts:
        if size <= 0:
            break
        found.append(part[:size])
        size -= len(part)
    return found


def size_class(size: int) -> int:
    """Return the size class of a request with a body of so many bytes."""
    return size.bit_length()
