"""Which events of a stream are content: what servers of language models send, API by API."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import pytest

from codedinvnet.gateway.content import MOST_EVENT, FirstContent

Event = dict[str, Any] | str


def delta(**fields: object) -> dict[str, Any]:
    return {"choices": [{"index": 0, "delta": fields, "finish_reason": None}]}


def text(text: str, **fields: object) -> Event:
    return {"choices": [{"index": 0, "text": text, "finish_reason": None, **fields}]}


def block(kind: str, **fields: object) -> Event:
    part = {"type": kind, **fields}
    return {"type": "content_block_start", "index": 0, "content_block": part}


def change(kind: str, **fields: object) -> Event:
    return {"type": "content_block_delta", "index": 0, "delta": {"type": kind, **fields}}


def response(kind: str, **fields: object) -> Event:
    return {"type": f"response.{kind}", "sequence_number": 0, **fields}


ROLE = delta(role="assistant", content="")
CALL = {"index": 0, "id": "c", "type": "function", "function": {"name": "f", "arguments": ""}}
STARTED = {"type": "message_start", "message": {"role": "assistant", "content": [], "usage": {}}}
CREATED = [response("created", response={"output": []}), response("in_progress", response={})]
MESSAGE = response("output_item.added", item={"type": "message", "content": []})
PART = response("content_part.added", part={"type": "output_text", "text": ""})
USAGE = {"prompt_tokens": 9, "completion_tokens": 0}

STREAMS: dict[str, tuple[Sequence[Event], Event]] = {
    # What comes before the first content, and the first content.
    "chat": ([ROLE], delta(content="a")),
    "chat, vLLM with reasoning": (
        [delta(role="assistant", content="", reasoning=None)],
        delta(reasoning="a"),
    ),
    "chat, SGLang with reasoning": (
        [delta(role="assistant", content="", reasoning_content=None, tool_calls=None)],
        delta(role=None, content=None, reasoning_content="a", tool_calls=None),
    ),
    "chat, a tool call": ([delta(role="assistant", content=None)], delta(tool_calls=[CALL])),
    "chat, an old function call": ([ROLE], delta(function_call={"name": "f"})),
    "chat, a refusal": ([delta(content="", refusal=None)], delta(refusal="no")),
    "chat, vLLM with usage in each chunk": (
        [{**ROLE, "usage": USAGE}],
        {**delta(content="a"), "usage": USAGE},
    ),
    "chat, vLLM with a token that has no text yet": (
        [{"choices": [{"delta": {"content": ""}, "token_ids": None}], "prompt_token_ids": [1]}],
        {"choices": [{"delta": {"content": ""}, "token_ids": [7]}]},
    ),
    "chat, llama.cpp with progress": (
        [
            delta(role="assistant", content=None),
            {"choices": [{"delta": {"role": "assistant"}}], "prompt_progress": {"processed": 9}},
        ],
        delta(content="a"),
    ),
    "chat, Ollama": ([], delta(role="assistant", content="a")),
    "chat, Ollama with reasoning": ([], delta(role="assistant", content="", reasoning="a")),
    "chat, TGI": ([ROLE], delta(role="assistant", content="a", tool_calls=None)),
    "chat, an empty answer": ([ROLE], {"choices": [{"delta": {}, "finish_reason": "stop"}]}),
    "chat, usage only": ([ROLE, {"choices": []}], {"choices": [], "usage": USAGE}),
    "chat, filter results first": (
        [{"choices": [], "prompt_filter_results": [{"prompt_index": 0}]}, ROLE],
        delta(content="a"),
    ),
    "chat, the second of two choices": (
        [ROLE],
        {"choices": [{"delta": {"content": ""}}, {"delta": {"content": "a"}}]},
    ),
    "completions": ([text("")], text("a")),
    "completions, vLLM with token ids": ([text("", token_ids=[])], text("", token_ids=[7])),
    "completions, the end": ([text("")], text("", finish_reason="stop")),
    "responses": (
        [*CREATED, MESSAGE, PART, response("output_text.delta", delta="")],
        response("output_text.delta", delta="a"),
    ),
    "responses with reasoning": (
        [
            *CREATED,
            response("output_item.added", item={"type": "reasoning", "summary": []}),
            response("reasoning_part.added", part={"type": "reasoning_text", "text": ""}),
        ],
        response("reasoning_text.delta", delta="a"),
    ),
    "responses with a summary of the reasoning": (
        [*CREATED, response("reasoning_summary_part.added", part={"text": ""})],
        response("reasoning_summary_text.delta", delta="a"),
    ),
    "responses, a tool call": (
        [*CREATED, {"type": "keepalive", "sequence_number": 2}],
        response("output_item.added", item={"type": "function_call", "name": "f"}),
    ),
    "responses, a failure": (CREATED, response("failed", response={"error": {"code": "x"}})),
    "responses, an error": (CREATED, {"type": "error", "message": "x"}),
    "messages": (
        [STARTED, block("text", text=""), {"type": "ping"}, change("text_delta", text="")],
        change("text_delta", text="a"),
    ),
    "messages with thinking": (
        [STARTED, block("thinking", thinking="", signature="")],
        change("thinking_delta", thinking="a"),
    ),
    "messages, hidden thinking": ([STARTED], block("redacted_thinking", data="x")),
    "messages, a tool call": ([STARTED], block("tool_use", id="t", name="f", input={})),
    "messages, an empty answer": (
        [STARTED],
        {"type": "message_delta", "delta": {"stop_reason": "end_turn"}, "usage": {}},
    ),
    "messages, an error": (
        [STARTED, {"type": "ping"}],
        {"type": "error", "error": {"type": "overloaded_error"}},
    ),
    "llama.cpp's /completion": (
        [{"content": "", "tokens": [], "stop": False, "prompt_progress": {"processed": 9}}],
        {"content": "a", "tokens": [7], "stop": False},
    ),
    "llama.cpp's /completion, the end": (
        [{"content": "", "tokens": [], "stop": False}],
        {"content": "", "tokens": [], "stop": True},
    ),
    "TGI's /generate_stream": ([], {"index": 1, "token": {"id": 7, "text": "a"}, "details": None}),
    "SGLang's /generate": ([], {"text": "a", "output_ids": [7], "meta_info": {}}),
    "an error, vLLM and SGLang": ([ROLE], {"error": {"message": "x", "code": 500}}),
    "an error, TGI": ([], {"error": "x", "error_type": "generation"}),
    "an error beside no choices": ([ROLE], {"error": {"code": 502}, "choices": []}),
    "the end": ([ROLE], "[DONE]"),
    "anything else": ([" "], "hi"),
    "not JSON": ([], "{"),
    "no object": ([], "[1]"),
    "no name of a type": ([], {"type": ["ping"], "x": 1}),
    "unknown choices": ([], {"choices": [1]}),
}


def written(event: Event, named: bool, end: str) -> bytes:
    """Return an event as it is sent, with its type as its name, as OpenAI and Anthropic do."""
    data = event if isinstance(event, str) else json.dumps(event)
    is_typed = named and isinstance(event, dict) and "type" in event
    name = f"event: {event['type']}{end}" if is_typed else ""  # type: ignore[index]
    return f": comment{end}{end}{name}data: {data}{end}{end}".encode()


@pytest.mark.parametrize("end", ["\n", "\r\n"])
@pytest.mark.parametrize("named", [True, False])
@pytest.mark.parametrize(("before", "content"), STREAMS.values(), ids=STREAMS)
def test_the_first_content(before: Sequence[Event], content: Event, named: bool, end: str) -> None:
    whole, parts = FirstContent(), FirstContent()
    for event in (*before, content):
        sent = written(event, named, end)
        found = [parts.feed(sent[at : at + 3]) for at in range(0, len(sent), 3)]
        assert whole.feed(sent) is any(found) is (event is content)


def test_a_prelude_may_be_as_long_as_its_instructions() -> None:
    """`response.created` repeats the request's instructions and tools."""
    created = response("created", response={"instructions": "x" * MOST_EVENT})
    assert not FirstContent().feed(written(created, True, "\n"))
