"""Messages as bytes."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from codedinvnet.common.errors import UserError
from codedinvnet.members.wire import (
    BadFrame,
    Decides,
    Frames,
    Hello,
    Message,
    Ping,
    encode,
    read_members,
)
from codedinvnet.scheduler.actions import Decode, Fail, Send
from codedinvnet.scheduler.events import Completed, Gone, Resumed, Submit, WorkerLost

SUBMIT = Submit((1 << 62,), 12.25, size_class=3, route='POST /v2/models/"é"/infer')
MESSAGES: list[Message] = [
    Hello("1", "d", "t", 7, 1.5, True, 2.5, ("http://a", "")),
    Decides(False),
    Ping(3.5),
    SUBMIT,
    Resumed(SUBMIT, ((5, 0, 1.25), (6, 1, 2.5))),
    Completed(5, False, True),
    WorkerLost(2, "refused", (5, 6)),
    Gone((1, 2)),
    Send(0, 5, 0, (1,), 1),
    Decode(1, 1, ((1, 5),), ((1, 0),)),
    Fail(1, "deadline"),
]


@given(st.lists(st.lists(st.sampled_from(MESSAGES))), st.integers(1, 40))
def test_messages_are_the_same_however_bytes_are_cut(
    batches: list[list[Message]], size: int
) -> None:
    data = b"".join(map(encode, batches))
    frames = Frames()
    found = [m for i in range(0, len(data), size) for m in frames.feed(data[i : i + size])]
    assert found == [message for batch in batches for message in batch]
    assert [type(m) for m in found] == [type(m) for batch in batches for m in batch]


@pytest.mark.parametrize(
    "data",
    [
        b"\xff\xff\xff\xff",
        b"\0\0\0\x04[[]]",
        b'\0\0\0\x09[["Ping"]',
        b'\0\0\0\x0b[["Import"]]',
        b"GET / HTTP/1.1\r\n\r\n",
        b"\0\0\x27\x10" + b"[" * 10000,
    ],
)
def test_what_no_member_sends_is_refused(data: bytes) -> None:
    with pytest.raises(BadFrame):
        assert list(Frames().feed(data)) is None


def test_lists_of_members() -> None:
    found = read_members("10.0.0.1:7100, [::1]:7101,dns+gateway:7100")
    assert found == [(False, "10.0.0.1", 7100), (False, "::1", 7101), (True, "gateway", 7100)]
    for bad in ("a", "a:b", ":1", "a:70000"):
        with pytest.raises(UserError, match="--members"):
            read_members(bad)
