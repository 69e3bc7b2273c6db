"""The lists of functions in `docs/explanation/a-query.md` are what requests go through."""

from __future__ import annotations

import asyncio
import json
import re
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from types import CodeType, FrameType
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import codedinvnet
from codedinvnet.serving.app import running
from codedinvnet.serving.config import ServeOptions
from tests.gateway.support import INFER, V2, echo, gateway

SOURCE = Path(codedinvnet.__file__).parent
PAGE = Path(__file__).parents[1] / "docs/explanation/a-query.md"


class Function(NamedTuple):
    """A function of the package."""

    file: str
    name: str


class Called(NamedTuple):
    """A call of a function, and the function of the package that made it; None: the event loop."""

    function: Function
    caller: Function | None


def function_of(code: CodeType) -> Function | None:
    path = Path(code.co_filename)
    if not path.is_relative_to(SOURCE):
        return None
    return Function(path.relative_to(SOURCE).with_suffix("").as_posix(), code.co_qualname)


@contextmanager
def recorded() -> Iterator[list[Called]]:
    """Record the calls in this thread meanwhile."""
    calls: list[Called] = []

    def record(frame: FrameType, event: str, _: Any) -> None:
        if event != "call" or (function := function_of(frame.f_code)) is None:
            return
        above, caller = frame.f_back, None
        while above is not None and (caller := function_of(above.f_code)) is None:
            above = above.f_back
        calls.append(Called(function, caller))

    sys.setprofile(record)
    try:
        yield calls
    finally:
        sys.setprofile(None)


def documented(title: str) -> list[list[Function]]:
    """Return the functions of each step in a section of the page."""
    section = PAGE.read_text().split(f"## {title}\n")[1].split("\n## ")[0]
    steps = []
    for step in re.findall(r"^\d+\. (.*?)\n\n", section, re.MULTILINE | re.DOTALL):
        file, functions = "", []
        for word in re.findall(r"`([^`]+)`", step):
            if "." in word:
                functions.append(Function(file, word))
            else:
                file = word
        steps.append(functions)
    return steps


def check(steps: list[list[Function]], calls: list[Called]) -> None:
    """Fail unless the calls follow the steps, and each function is called by the one before it.

    Whoever begins a step is called by the event loop, or by a function that the list has.
    """
    place, seen = 0, set[Function | None]({None})
    for step in steps:
        before: Function | None = None
        for function in step:
            callers = seen if before is None else {before}
            if before is None and function in seen:  # a task that goes on: it isn't called again
                before = function
                continue
            found = (n for n in range(place, len(calls)) if calls[n].function == function)
            at = next((n for n in found if calls[n].caller in callers), None)
            assert at is not None, f"{function} is not called by {before or 'a listed function'}"
            place, before = at, function
            seen.add(function)


async def exchange(port: int, request: bytes) -> AsyncIterator[None]:
    """Send a request again and again on one connection, and wait for each answer."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        while True:
            writer.write(request)
            head = await reader.readuntil(b"\r\n\r\n")
            found = re.search(rb"(?i)content-length: *(\d+)", head)
            assert head.startswith(b"HTTP/1.1 200")
            assert found is not None
            await reader.readexactly(int(found[1]))
            yield
    finally:
        writer.close()


@asynccontextmanager
async def warm(port: int, path: str, body: bytes) -> AsyncIterator[AsyncIterator[None]]:
    """Give what sends a request and waits for the answer, on connections that have been used."""
    head = f"POST {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: {len(body)}\r\n\r\n"
    asking = exchange(port, head.encode() + body)
    for _ in range(3):
        await anext(asking)
    yield asking
    await asking.aclose()  # type: ignore[attr-defined]


def sized(title: str, most: int, most_files: int) -> list[list[Function]]:
    """Return a section's steps, with as many functions as it says, and no more than may be."""
    steps = documented(title)
    functions = {function for step in steps for function in step}
    files = {function.file for function in functions}
    assert f"{len(functions)} functions in {len(files)} files" in PAGE.read_text()
    assert len(functions) <= most
    assert len(files) <= most_files
    return steps


async def test_a_request_goes_through_the_gateway_as_the_page_says() -> None:
    steps = sized("Through the gateway", 25, 9)
    async with gateway(echo) as front, warm(front.client.origin.port, V2, INFER) as asking:
        with recorded() as calls:
            await anext(asking)
    check(steps, calls)


async def test_a_query_goes_through_serve_as_the_page_says() -> None:
    steps = sized("Through `serve`", 24, 10)
    image = {"name": "images", "shape": [1, 1, 28, 28], "datatype": "UINT8", "data": [0] * 784}
    options = ServeOptions(source="mnist", workers=1, policy="uncoded", port=0)
    async with running(options) as (url, _):
        path, body = "/v2/models/mnist/infer", json.dumps({"inputs": [image]}).encode()
        async with warm(urlsplit(url).port or 0, path, body) as asking:
            with recorded() as calls:
                await anext(asking)
    check(steps, calls)
