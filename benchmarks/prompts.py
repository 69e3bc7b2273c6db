"""What clients ask models that cache prefixes: chats, long documents, and a public trace's mix."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple, TypeAlias

import numpy as np

SESSIONS, TURNS = 30, 6
SYSTEM, SAID, ANSWERED = 2000, 4000, 400
"""Bytes of the instructions, which all share, of what a client says in a turn in the mean, and of
an answer."""
START, THINK = 0.4, 1.5
"""Mean seconds between two beginnings of sessions, and from an answer to the next turn."""
DOCUMENTS, QUESTIONS, ASKED = 12, 150, 0.1
"""How many documents there are, how many questions about them, and the mean seconds from one to the
next. The n-th document gets a share of 1/n."""
SHORTEST, LONGEST, QUESTION = 16_000, 40_000, 200
"""Bytes of a document, and of a question."""
TRACE = Path(__file__).with_name("mooncake.json")
BLOCK, WINDOW, SPED = 512, 3000, 140
"""Tokens of a block of the trace, the milliseconds that its times are rounded to, and how many
times as fast it is replayed: an hour in 25 seconds. A token is a byte here."""

Messages: TypeAlias = Sequence[Mapping[str, str]]


class Turn(NamedTuple):
    """A request of a chain; the next one comes after its answer."""

    pause: float
    """Seconds before it."""
    session: str
    messages: Messages


Chain: TypeAlias = Sequence[Turn]


def text(rng: np.random.Generator, size: int) -> str:
    """Return so many random letters."""
    return bytes(rng.integers(97, 123, size, np.uint8)).decode()


def message(role: str, content: str) -> dict[str, str]:
    """Return a message of a prompt."""
    return {"role": role, "content": content}


def chats(seed: int) -> Sequence[Chain]:
    """Return sessions in which a turn sends all that was said before."""
    starts = np.cumsum(np.random.default_rng(seed).exponential(START, SESSIONS))
    shared = message("system", text(np.random.default_rng(seed), SYSTEM))
    found = []
    for number, start in enumerate(starts):
        rng, pause = np.random.default_rng([seed, number]), float(start)
        said, turns = [shared], list[Turn]()
        for _ in range(TURNS):
            said.append(message("user", text(rng, int(SAID * rng.lognormal(-0.125, 0.5)))))
            turns.append(Turn(pause, f"s{number}", list(said)))
            said.append(message("assistant", text(rng, ANSWERED)))
            pause = float(rng.exponential(THINK))
        found.append(turns)
    return found


def documents(seed: int) -> Sequence[Chain]:
    """Return questions about a few long documents; a document is a session."""
    rng = np.random.default_rng(seed)
    sizes = rng.integers(SHORTEST, LONGEST, DOCUMENTS)
    contents = [message("system", text(rng, int(size))) for size in sizes]
    shares = 1 / np.arange(1, DOCUMENTS + 1)
    picked = rng.choice(DOCUMENTS, QUESTIONS, p=shares / shares.sum())
    times = np.cumsum(rng.exponential(ASKED, QUESTIONS))
    asked = [message("user", text(rng, QUESTION)) for _ in picked]
    return [
        [Turn(float(at), f"d{number}", [contents[number], question])]
        for at, number, question in zip(times, picked, asked, strict=True)
    ]


def trace(seed: int) -> Sequence[Chain]:
    """Return the requests of a trace; a conversation of it is a session."""
    rng, blocks, found = np.random.default_rng(seed), dict[int, str](), []
    for ms, tokens, runs in json.loads(TRACE.read_text(encoding="utf-8"))["requests"]:
        numbers = [first + n for first, count in runs for n in range(count)]
        for number in numbers:
            if number not in blocks:
                blocks[number] = text(np.random.default_rng([seed, number]), BLOCK)
        prompt = "".join(blocks[number] for number in numbers)[:tokens]
        at = (ms + WINDOW * rng.random()) / 1000 / SPED
        found.append([Turn(float(at), f"t{numbers[1]}", [message("user", prompt)])])
    return found


WORKLOADS: dict[str, Callable[[int], Sequence[Chain]]] = {
    "chats": chats,
    "documents": documents,
    "trace": trace,
}
