"""The settings of a load, checked before anything is sent; when its requests are due."""

from __future__ import annotations

import datetime
import math
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import unquote, urlsplit, urlunsplit

import numpy as np

from codedinvnet.arrivals import poisson_gaps
from codedinvnet.errors import UserError
from codedinvnet.models.upstream import PATH

POISSON, CONSTANT = "poisson", "constant"
FRACTION = re.compile(r"^(\d{4}-\d\d-\d\d[T,\s]+\d\d:\d\d:\d\d),(?=\d{3}(?:\d{3})?(?:[Z+\s-]|$))")
"""A date and a time with a fraction of a second behind a comma, as Python's logs have it."""
RATE = 10.0
"""Requests a second, if nobody says."""
LATEST = 1e11
"""Of a log, in seconds: three thousand years. Milliseconds since 1970 are more."""
FEW = 10
"""With fewer requests due, of a log that has ten times as many, something may be wrong."""


@dataclass(frozen=True)
class LoadOptions:
    """What the command line may say."""

    url: str
    """A server, or its model: http://HOST:PORT/v2/models/NAME."""
    model: str | None = None
    model_version: str = ""
    rate: float | None = None
    """Requests a second; None: the log's, or 10."""
    duration: float = 30.0
    """Seconds."""
    arrivals: str = POISSON
    """`poisson`, `constant`, or a file with a time a line."""
    batch: int = 1
    inputs: Path | None = None
    shapes: tuple[str, ...] = ()
    """NAME:DATATYPE:SHAPE of inputs that the metadata leave open."""
    header: tuple[str, ...] = ()
    """NAME: VALUE, sent with every request."""
    timeout: float = 60.0
    max_open: int = 10_000
    seed: int = 0
    out: Path | None = None
    json: bool = False

    @property
    def is_log(self) -> bool:
        """Whether `arrivals` names a file."""
        return self.arrivals not in (POISSON, CONSTANT)


def check(options: LoadOptions) -> None:
    """Refuse what cannot work.

    Raises:
        UserError: naming the option.
    """
    for name in ("rate", "duration", "batch", "timeout", "max_open"):
        value = getattr(options, name)
        if value is not None and not 0 < value < math.inf:
            raise UserError(f"--{name.replace('_', '-')}: must be above 0, got {value}")
    headers(options)


def server_and_model(options: LoadOptions) -> tuple[str, str]:
    """Return the server's address and the model's name.

    Raises:
        UserError: if nobody says the name, or both do and differ.
    """
    try:
        parts = urlsplit(options.url)
    except ValueError as error:
        raise UserError(f"URL: {options.url!r} is none: {error}") from error
    base, found, name = parts.path.partition(PATH)
    told = unquote(name.strip("/")) if found else ""
    if "/" in told:
        raise UserError(f"URL: {options.url!r}: say a version by --model-version")
    model = options.model or told
    if not model:
        raise UserError(f"URL: which model? {options.url.rstrip('/')}{PATH}NAME, or --model NAME")
    if told and model != told:
        raise UserError(f"--model: {model!r} is not the {told!r} of the URL")
    return urlunsplit((*parts[:2], base, *parts[3:])), model


def headers(options: LoadOptions) -> tuple[tuple[str, str], ...]:
    """Return the headers that are sent with every request.

    Raises:
        UserError: if one is none.
    """
    pairs = []
    for text in options.header:
        name, colon, value = text.partition(":")
        if not colon or not name.strip() or not text.isascii() or not text.isprintable():
            raise UserError(f"--header: {name!r} is not NAME: VALUE")
        pairs.append((name.strip().lower(), value.strip()))
    return tuple(pairs)


def gaps_of(options: LoadOptions) -> list[float]:
    """Return the seconds before each request. Tell if these are few of a log's.

    Raises:
        UserError: if they are in a file that cannot be read, or in no seconds, or none is due.
    """
    if not options.is_log:
        rate = options.rate or RATE
        count = math.ceil(rate * options.duration)
        if options.arrivals == CONSTANT:
            gaps = np.full(count, 1 / rate)
        else:  # so many that they last for longer, all but certainly
            count += math.ceil(6 * math.sqrt(count))
            gaps = np.array(poisson_gaps(rate, count, options.seed))
    else:
        times = np.sort(read_times(Path(options.arrivals)))
        if options.rate is None and max(-times[0], times[-1]) > LATEST:
            told = f"--arrivals: {options.arrivals}: {times[-1]:.0f} is no time in seconds"
            raise UserError(f"{told}: divide by 1000 if it is in ms, or say --rate")
        gaps = np.diff(times, prepend=times[0])
        if options.rate is not None and times[-1] > times[0]:
            gaps *= (len(times) - 1) / (times[-1] - times[0]) / options.rate
    within = np.cumsum(gaps) <= (1 + 1e-9) * options.duration  # sums are not exact
    due = int(within.sum())
    if not due:
        raise UserError("--duration: no request is due in it")
    if options.is_log and options.rate is None and due < FEW and len(gaps) >= 10 * due:
        told = f"warning: {due} of the {len(gaps)} requests of {options.arrivals} are due within"
        told += f" {options.duration:g} s (--duration): are its times in seconds?"
        print(told, file=sys.stderr)
    return [float(gap) for gap in gaps[within]]


def read_times(path: Path) -> Sequence[float]:
    """Return the times in a log: in seconds, or by date and time (ISO 8601); first on their line.

    Raises:
        UserError: naming the line.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise UserError(f"--arrivals: cannot read {path}: {reason}") from error
    texts = [line.partition("#")[0].strip() for line in lines]
    head = texts[0] if texts else ""
    is_table = "," in head and not FRACTION.match(head)
    if not is_table and all(FRACTION.match(text) for text in texts[1:] if text):
        texts = [FRACTION.sub(r"\1.", text) for text in texts]
    found = []
    for number, text in enumerate(texts, 1):
        words = text.replace(",", " ").split()
        if words:
            try:
                found.append(_time(words))
            except ValueError as error:
                if number == 1:  # a table's head
                    continue
                told = f"--arrivals: {path}, line {number}: {words[0]!r} is no time"
                raise UserError(told) from error
    if not found:
        raise UserError(f"--arrivals: {path} has no time")
    return found


def _time(words: Sequence[str]) -> float:
    word = words[0]
    try:
        value = float(word)
    except ValueError:
        if len(word) <= len("2026-01-31"):  # the time of day is the next word, or missing
            word = "T".join(words[:2])
            if ":" not in word:
                raise
        # Python 3.10 reads fractions of three or six digits alone, and offsets with a colon.
        word = re.sub(r"\.(\d+)", lambda found: f".{found[1][:6]:0<6}", word)
        word = re.sub(r"([+-]\d\d)(\d\d)$", r"\1:\2", word)
        value = datetime.datetime.fromisoformat(word.replace("Z", "+00:00")).timestamp()
    if not math.isfinite(value):
        raise ValueError(word)
    return value
