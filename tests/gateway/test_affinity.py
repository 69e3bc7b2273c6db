"""`--affinity`: requests of a session, or with a known beginning, go where that is cached."""

from __future__ import annotations

import json

import pytest

from codedinvnet.common.errors import UserError
from codedinvnet.gateway.affinity import Affinity
from codedinvnet.net.http1 import RequestHead
from tests.gateway.support import Running, gateway
from tests.observing import until
from tests.upstream import saying

CHAT = "/v1/chat/completions"
thinking = saying(b"{}", after=0.02)


def turns(session: str, count: int, **more: str) -> bytes:
    """Return a chat's request after so many turns, each of which is 2 KB."""
    said = [{"role": "user", "content": f"{session} {n} " + 500 * "word "} for n in range(count)]
    return json.dumps({"model": "m", "messages": said, "max_tokens": count, **more}).encode()


async def say(g: Running, how: str, session: str, count: int) -> None:
    fields = {"x-session": {"x_session": session}, "cookie:sid": {"cookie": f"a=b; sid={session}"}}
    more = {"user": session} if how == "body:user" else {}
    found = await g.ask("POST", CHAT, turns(session, count, **more), **fields.get(how, {}))
    assert found.status == 200


def visits(g: Running) -> list[set[str]]:
    """Return the sessions that each upstream saw."""
    return [
        {json.loads(request.body)["messages"][0]["content"].split()[0] for request in one.requests}
        for one in g.upstreams
    ]


@pytest.mark.parametrize("how", ["prefix", "x-session", "cookie:sid", "body:user"])
async def test_each_session_has_one_upstream(how: str) -> None:
    sessions = [f"s{number}" for number in range(5)]  # not a multiple of the upstreams
    async with gateway(thinking, thinking, thinking, affinity=how) as g:  # nothing is copied
        for count in range(1, 6):  # one after the other, so that any upstream could answer each
            for session in sessions:
                await say(g, how, session, count)
        found = visits(g)
        assert sorted(each for one in found for each in one) == sessions
        assert all(found), "all are used"


async def test_a_session_moves_once_when_its_upstream_is_gone() -> None:
    async with gateway(thinking, thinking, affinity="prefix") as g:
        await say(g, "prefix", "a", 1)
        home = next(one for one in g.upstreams if one.requests)
        await home.stop()
        for count in range(2, 6):
            await until(lambda: g.metric("upstream_up") == 1)
            await say(g, "prefix", "a", count)
        other = next(one for one in g.upstreams if one is not home)
        assert len(other.requests) >= 4


@pytest.mark.parametrize("body", [b"", b"no JSON", b'{"inputs": []}', b'{"messages": "short"}'])
async def test_what_has_no_beginning_goes_anywhere(body: bytes) -> None:
    async with gateway(thinking, thinking, affinity="prefix") as g:
        for _ in range(4):
            assert (await g.ask("POST", CHAT, body)).status == 200
        assert all(one.requests for one in g.upstreams)


@pytest.mark.parametrize("how", ["", "cookie:", "cookie:a b", "body:", "body:a-b", "head:x", "a b"])
def test_other_words_are_refused(how: str) -> None:
    with pytest.raises(UserError, match="--affinity: must be prefix"):
        Affinity(how)


def test_a_long_prompt_is_known_by_its_first_two_megabytes() -> None:
    affinity, size = Affinity("prefix"), 3 << 20
    head = RequestHead(b"POST", CHAT.encode(), [(b"Host", b"a")], b"1")
    first, second = (
        affinity.prompt(head, [b'{"prompt": "', size * b"a", end]) for end in (b'a"}', b'bb"}')
    )
    assert first is not None
    assert second is not None
    assert first.keys == second.keys
    assert first.keys[-1][1] < 1 << 21
    assert first.size > size
