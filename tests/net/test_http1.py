"""What is read of HTTP/1.1, what is refused, and that a message may come in any parts."""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from codedinvnet.net.http1 import (
    HOP_BY_HOP,
    BadMessage,
    Chunks,
    Head,
    HeadReader,
    read_request,
    read_response,
)
from codedinvnet.net.memory import Account, Memory
from codedinvnet.net.requests import RequestReader

HOST = b"Host: a\r\n"
GET = b"GET / HTTP/1.1\r\n"


@pytest.mark.parametrize(
    "head",
    [
        b"GET /\r\nHost: a\r\n\r\n",
        b"GET / HTTP/2.0\r\nHost: a\r\n\r\n",
        b"GET  / HTTP/1.1\r\nHost: a\r\n\r\n",
        b"G(T / HTTP/1.1\r\nHost: a\r\n\r\n",
        b"GET /\x01 HTTP/1.1\r\nHost: a\r\n\r\n",
        b"GET /\x80 HTTP/1.1\r\nHost: a\r\n\r\n",
        b"GET /# HTTP/1.1\r\nHost: a\r\n\r\n",
        b"GET / HTTP/1.1\nHost: a\r\n\r\n",
        GET + b"\r\n",
        GET + HOST + HOST + b"\r\n",
        GET + b"Host: a b\r\n\r\n",
        GET + b"Host: a/b\r\n\r\n",
        GET + b"Host: a@b\r\n\r\n",
        GET + b"Host: a,b\r\n\r\n",
        GET + b"Host: a:b\r\n\r\n",
        GET + b"Host: a:80:80\r\n\r\n",
        GET + b"Host: ::1\r\n\r\n",
        GET + b"Host: [a\r\n\r\n",
        GET + b"Host: \xe9\r\n\r\n",
        b"GET / HTTP/1.0\r\nHost: a b\r\n\r\n",
        GET + HOST + b"A: b\nC: d\r\n\r\n",
        GET + HOST + b"A: b\rC: d\r\n\r\n",
        GET + HOST + b"A: b\r\n folded\r\n\r\n",
        GET + HOST + b"A : b\r\n\r\n",
        GET + HOST + b": b\r\n\r\n",
        GET + HOST + b"A\r\n\r\n",
        GET + HOST + b"A: \0\r\n\r\n",
        GET + HOST + b"Content-Length: 1\r\nContent-Length: 1\r\n\r\n",
        GET + HOST + b"Content-Length: 1, 1\r\n\r\n",
        GET + HOST + b"Content-Length: +1\r\n\r\n",
        GET + HOST + b"Content-Length: -1\r\n\r\n",
        GET + HOST + b"Content-Length: 0x1\r\n\r\n",
        GET + HOST + b"Content-Length:\r\n\r\n",
        GET + HOST + b"Content-Length: 1\r\nTransfer-Encoding: chunked\r\n\r\n",
        GET + HOST + b"Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked\r\n\r\n",
        GET + HOST + b"Transfer-Encoding: gzip, chunked\r\n\r\n",
        GET + HOST + b"Transfer-Encoding: identity\r\n\r\n",
        b"GET / HTTP/1.0\r\nTransfer-Encoding: chunked\r\n\r\n",
    ],
)
def test_what_two_readers_could_understand_differently_is_refused(head: bytes) -> None:
    with pytest.raises(BadMessage):
        read_request(head)


@pytest.mark.parametrize(
    "host", [b"", b"a", b"A.b-c_d.", b"10.0.0.1:8000", b"[::1]", b"[1::2]:443"]
)
def test_hosts_are_names_or_addresses_with_or_without_a_port(host: bytes) -> None:
    assert read_request(GET + b"Host: " + host + b"\r\n\r\n").known[b"host"] == host


@pytest.mark.parametrize(
    ("method", "target", "path", "host"),
    [
        (b"GET", b"http://h", b"/", b"h"),
        (b"GET", b"HTTPS://h:1/a/b?c=http://i/", b"/a/b?c=http://i/", b"h:1"),
        (b"GET", b"http://h?a=1", b"/?a=1", b"h"),
        (b"GET", b"http://h?x=/admin/delete", b"/?x=/admin/delete", b"h"),
        (b"GET", b"http://[::1]//a", b"//a", b"[::1]"),
        (b"OPTIONS", b"http://h", b"*", b"h"),
        (b"OPTIONS", b"http://h/", b"/", b"h"),
        (b"OPTIONS", b"*", b"*", b"a"),
        (b"GET", b"//h/a", b"//h/a", b"a"),
    ],
)
def test_targets_with_a_host(method: bytes, target: bytes, path: bytes, host: bytes) -> None:
    head = read_request(method + b" " + target + b" HTTP/1.1\r\n" + HOST + b"\r\n")
    head.to_origin_form()
    assert (head.target, head.known[b"host"]) == (path, host)


@pytest.mark.parametrize(
    "target",
    [b"*", b"a", b"http:/a", b"http://", b"http:///a", b"http://?a", b"http://u@h/", b"ftp://h/"],
)
def test_targets_that_are_no_path_are_refused(target: bytes) -> None:
    head = read_request(b"GET " + target + b" HTTP/1.1\r\n" + HOST + b"\r\n")
    with pytest.raises(BadMessage):
        head.to_origin_form()


def test_a_head_that_comes_again_is_understood_as_before_and_no_other_is() -> None:
    reader = HeadReader(read_request)
    wanted = (b"/a", b"/a", b"/b", b"/a")
    for path in wanted:
        head = reader.read(b"GET http://h" + path + b" HTTP/1.1\r\n" + HOST + b"\r\n")
        head.to_origin_form()
        assert (head.target, head.known[b"host"]) == (path, b"h")
    for _ in range(2):
        with pytest.raises(BadMessage):
            reader.read(b"GET /a HTTP/1.1\r\n\r\n")


@pytest.mark.parametrize("read", [read_request, read_response])
def test_heads_have_a_bounded_number_of_fields(read: Callable[[bytes], Head]) -> None:
    start = GET + HOST if read is read_request else b"HTTP/1.1 200 OK\r\nA: b\r\n"
    assert len(read(start + 99 * b"a:\r\n" + b"\r\n").fields) == 100
    with pytest.raises(BadMessage) as refused:
        read(start + 100 * b"a:\r\n" + b"\r\n")
    assert refused.value.status == 431


def test_a_proxy_passes_the_length_on_whatever_the_connection_names() -> None:
    head = read_response(
        b"HTTP/1.1 200 OK\r\nConnection: Content-Length, X-A, date\r\nX-A: b\r\n"
        b"Content-Length: 2\r\nB: c\r\n\r\n"
    )
    assert head.end_to_end() == [(b"Content-Length", b" 2"), (b"B", b" c")]
    assert head.end_to_end(HOP_BY_HOP | {b"content-length"}) == [(b"B", b" c")]


def test_a_request_is_read_as_it_came() -> None:
    head = read_request(GET + HOST + b"X-A:  b \r\nx-a: c\r\nConnection: close, X-A\r\n\r\n")

    assert (head.method, head.target, head.keeps, head.length) == (b"GET", b"/", False, None)
    assert head.fields[1:3] == [(b"X-A", b"  b "), (b"x-a", b" c")]
    assert head.known[b"x-a"] == b"b,c"
    assert head.end_to_end(HOP_BY_HOP | {b"host"}) == []


@pytest.mark.parametrize(
    "head", [b"HTTP/1.1 2000 OK\r\n\r\n", b"HTTP/1.1 OK\r\n\r\n", b"ICY 200 OK\r\n\r\n"]
)
def test_an_answer_without_a_status_is_refused(head: bytes) -> None:
    with pytest.raises(BadMessage):
        read_response(head)


def test_which_answers_have_a_body() -> None:
    for status, body in ((200, True), (204, False), (304, False), (404, True)):
        assert read_response(b"HTTP/1.1 %d\r\n\r\n" % status).has_body(b"GET") is body
    assert not read_response(b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\n").has_body(b"HEAD")


@given(
    st.lists(st.binary(min_size=1, max_size=20)),
    st.lists(st.integers(0, 200)),
    st.sampled_from([b"", b"X-Sum: 1\r\n"]),
)
def test_chunks_may_come_in_any_parts(
    pieces: list[bytes], cuts: list[int], trailers: bytes
) -> None:
    message = b"".join(b"%x;a=b\r\n%b\r\n" % (len(piece), piece) for piece in pieces)
    message += b"0\r\n" + trailers + b"\r\n" + b"next"
    chunks, found, rest = Chunks(), b"", b""
    for begin, end in zip([0, *sorted(cuts)], [*sorted(cuts), len(message)], strict=True):
        if chunks.done:
            rest += message[begin:end]
        else:
            parts, at = chunks.feed(b"." + message[begin:end], 1)
            found += b"".join(parts)
            rest += message[begin + at - 1 : end]

    assert (chunks.done, found, rest) == (True, b"".join(pieces), b"next")
    assert chunks.trailers == ([(b"X-Sum", b" 1")] if trailers else [])


@pytest.mark.parametrize(
    "body",
    [
        b"x\r\n",
        b"-1\r\n",
        b"1\nab",
        b"1\r\nab\r\n",
        b"1\r\naxx0\r\n\r\n",
        b"0\r\na\n\r\n\r\n",
        b"1" * 2000,
        b"\r\n0\r\n",
    ],
)
def test_malformed_chunks_are_refused(body: bytes) -> None:
    with pytest.raises(BadMessage):
        Chunks().feed(body)


@pytest.mark.parametrize("is_trailer", [False, True])
def test_a_head_in_single_bytes_takes_time_in_proportion(is_trailer: bool) -> None:
    """Or else one client with a long head, or long trailers, keeps everyone waiting."""

    def seconds(lines: int) -> float:
        fields = b"".join(b"a: " + bytes([97]) * 1000 + b"\r\n" for _ in range(lines)) + b"\r\n"
        memory = Memory(1 << 20)
        reader = RequestReader(memory, Account(memory), lambda head: 0, lambda head, waits: True)
        if is_trailer:
            reader.feed(GET + HOST + b"Transfer-Encoding: chunked\r\n\r\n0\r\n")
        else:
            reader.feed(GET + HOST)
        began = time.process_time()
        for byte in fields:
            reader.feed(bytes([byte]))
        taken = time.process_time() - began
        assert reader.is_complete
        return taken

    assert min(seconds(60) for _ in range(3)) < 10 * min(seconds(15) for _ in range(3))
