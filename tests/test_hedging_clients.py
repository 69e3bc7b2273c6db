"""OpenAI's and Anthropic's clients on the hedging transport; one of two servers stalls."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import anthropic
import httpx2
import openai
import pytest

from codedinvnet.hedging import HedgingTransport
from tests.upstream import Reply, Request, Toy

STALL = 12.0
"""Seconds; clients wait for a third of it."""
TOOL = {"type": "object", "properties": {}}

Event = dict[str, Any]


def pieces(text: str) -> list[str]:
    return [text[at : at + 4] for at in range(0, len(text), 4)]


def chat(text: str, is_tool: bool) -> Iterator[Event]:
    """Yield chunks of OpenAI's chat completions, the role first."""

    def chunk(delta: Event, finish: str | None = None) -> Event:
        choice = {"index": 0, "delta": delta, "finish_reason": finish}
        about = {"id": "1", "object": "chat.completion.chunk", "created": 0, "model": "m"}
        return {**about, "choices": [choice]}

    yield chunk({"role": "assistant", "content": None if is_tool else ""})
    if is_tool:
        function = {"name": "tell", "arguments": ""}
        call = {"index": 0, "id": "t", "type": "function", "function": function}
        yield chunk({"tool_calls": [call]})
    for piece in pieces(text):
        tool = {"index": 0, "function": {"arguments": piece}}
        yield chunk({"tool_calls": [tool]} if is_tool else {"content": piece})
    yield chunk({}, "tool_calls" if is_tool else "stop")


def messages(text: str, is_tool: bool) -> Iterator[Event]:
    """Yield events of Anthropic's messages."""
    usage = {"input_tokens": 1, "output_tokens": 1}
    yield {"type": "message_start", "message": message([], usage)}
    empty = {"type": "tool_use", "id": "t", "name": "tell", "input": {}}
    block = empty if is_tool else {"type": "text", "text": ""}
    yield {"type": "content_block_start", "index": 0, "content_block": block}
    yield {"type": "ping"}
    for piece in pieces(text):
        kind = ("input_json_delta", "partial_json") if is_tool else ("text_delta", "text")
        delta = {"type": kind[0], kind[1]: piece}
        yield {"type": "content_block_delta", "index": 0, "delta": delta}
    yield {"type": "content_block_stop", "index": 0}
    end = {"stop_reason": "tool_use" if is_tool else "end_turn", "stop_sequence": None}
    yield {"type": "message_delta", "delta": end, "usage": usage}
    yield {"type": "message_stop"}


def message(content: list[Event], usage: Event) -> Event:
    about = {"id": "1", "type": "message", "role": "assistant", "model": "m"}
    return {**about, "content": content, "stop_reason": None, "stop_sequence": None, "usage": usage}


def whole(path: str, text: str) -> Event:
    if path == "/v1/messages":
        return message([{"type": "text", "text": text}], {"input_tokens": 1, "output_tokens": 1})
    answer = {"role": "assistant", "content": text}
    choice = {"index": 0, "finish_reason": "stop", "message": answer}
    about = {"id": "1", "object": "chat.completion", "created": 0, "model": "m"}
    return {**about, "choices": [choice]}


async def sent(events: Iterator[Event], stall: float) -> AsyncIterator[bytes]:
    """Send the first event at once, and the others one by one, as a model computes them."""
    for number, event in enumerate(events):
        if number == 1:
            await asyncio.sleep(0.005 + stall)
        name = f"event: {event['type']}\n" if "type" in event else ""
        yield f"{name}data: {json.dumps(event)}\n\n".encode()
        await asyncio.sleep(0.001)
    if not name:
        yield b"data: [DONE]\n\n"


def model(name: str, every: int = 0, fails: bool = False) -> Callable[[Request], Reply]:
    """Answer with the server's name and the prompt; hold every so many-th answer back.

    One that fails says so in the middle of a stream.
    """

    def answer(request: Request) -> Reply:
        if request.method == "GET":
            return Reply(b"ok")
        asked = json.loads(request.body)
        text = f"{name} was asked: {asked['messages'][0]['content']}"
        stall = STALL if every and request.number % every == 0 else 0.0
        if not asked.get("stream"):
            reply = json.dumps(whole(request.path, text)).encode()
            return Reply(reply, type="application/json", delay=0.005 + stall)
        is_tool = "tools" in asked
        text = json.dumps({"said": text}) if is_tool else text
        events = messages if request.path == "/v1/messages" else chat
        found = list(events(text, is_tool))
        if fails:
            error = {"type": "error", "error": {"type": "api_error", "message": "out of memory"}}
            found = [*found[:4], error]
        return Reply(sent(iter(found), stall), type="text/event-stream")

    return answer


async def of(call: Callable[[], Any]) -> Any:
    """Return what a client's method returns, or a thread if it blocks."""
    found = await asyncio.to_thread(call)
    return await found if isinstance(found, Awaitable) else found


async def read(stream: Any) -> list[Any]:
    if hasattr(stream, "__aiter__"):
        return [event async for event in stream]
    return await asyncio.to_thread(list, stream)


async def ask_openai(client: Any, prompt: str, how: str) -> str:
    create = partial(
        client.chat.completions.create, model="m", messages=[{"role": "user", "content": prompt}]
    )
    if how == "whole":
        answer = await of(create)
        return str(answer.choices[0].message.content)
    if how == "stream":
        chunks = await read(await of(partial(create, stream=True)))
        return "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
    tool = {"type": "function", "function": {"name": "tell", "parameters": TOOL}}
    chunks = await read(await of(partial(create, stream=True, tools=[tool])))
    calls = [call for chunk in chunks for call in chunk.choices[0].delta.tool_calls or ()]
    assert [call.function.name for call in calls if call.function.name] == ["tell"]
    return str(json.loads("".join(call.function.arguments for call in calls))["said"])


async def ask_anthropic(client: Any, prompt: str, how: str) -> str:
    create = partial(
        client.messages.create,
        model="m",
        max_tokens=100,
        messages=[{"role": "user", "content": prompt}],
    )
    if how == "whole":
        answer = await of(create)
        return str(answer.content[0].text)
    tools = {} if how == "stream" else {"tools": [{"name": "tell", "input_schema": TOOL}]}
    events = await read(await of(partial(create, stream=True, **tools)))
    deltas = [event.delta for event in events if event.type == "content_block_delta"]
    if how == "stream":
        return "".join(delta.text for delta in deltas)
    return str(json.loads("".join(delta.partial_json for delta in deltas))["said"])


class Kind(NamedTuple):
    """A client, and how it is asked."""

    create: Any
    http: Any
    ask: Callable[[Any, str, str], Awaitable[str]]
    url: str


KINDS = {
    "openai-async": Kind(openai.AsyncOpenAI, httpx2.AsyncClient, ask_openai, "http://model/v1"),
    "anthropic": Kind(anthropic.Anthropic, httpx2.Client, ask_anthropic, "http://model"),
}


@contextlib.asynccontextmanager
async def asking(kind: Kind, toys: Sequence[Toy]) -> AsyncIterator[tuple[Any, HedgingTransport]]:
    """Yield a client on a transport, and the transport."""
    urls, paths = [toy.url for toy in toys], ("/v1/chat/completions", "/v1/messages")
    transport = HedgingTransport(urls, hedge=[f"POST {path}" for path in paths], budget=0.5)
    client = kind.create(
        api_key="none",
        base_url=kind.url,
        http_client=kind.http(transport=transport),
        max_retries=0,
        timeout=STALL / 3,
    )
    try:
        yield client, transport
    finally:
        await of(client.close)


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
async def test_answers_are_whole_and_from_one_server_though_the_other_stalls(kind: Kind) -> None:
    async with Toy(model("a")) as a, Toy(model("b")) as b:
        async with asking(kind, [a, b]) as (client, transport):
            for number in range(400):
                if number == 75:  # it knows by now how long an answer of each kind takes
                    a.handle = model("a", every=4)
                how = ("stream", "tools", "whole")[number % 3]
                answer = await kind.ask(client, f"{how} {number}", how)
                assert answer in [f"{name} was asked: {how} {number}" for name in "ab"]
                if number >= 120 and transport.stats.won:
                    break  # on a busy machine it may take a while until one is asked that stalls
        stats = transport.stats
        assert stats.requests == number + 1
        assert 1 <= stats.won <= stats.hedged


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
async def test_an_error_in_mid_stream_is_the_clients_to_see(kind: Kind) -> None:
    async with Toy(model("a", fails=True)) as a, Toy(model("b", fails=True)) as b:
        async with asking(kind, [a, b]) as (client, _):
            with pytest.raises((openai.APIError, anthropic.APIError), match="out of memory"):
                await kind.ask(client, "anything", "stream")
        assert sum(each.method == "POST" for each in a.requests + b.requests) == 1
