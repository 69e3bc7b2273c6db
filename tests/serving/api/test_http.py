"""The protocol over HTTP: answers, and requests that are wrong."""

from __future__ import annotations

import gzip
import json
import re
import time
from typing import Any

import numpy as np
import pytest

from codedinvnet.models.bundle import Bundle
from codedinvnet.net.protocol.messages import HEADER_LENGTH
from tests.serving.api.service import INFER, MAX_BODY, error, largest_gap, serving, tensor


class TestInfer:
    async def test_the_time_that_was_spent_on_workers(
        self, mnist: Bundle, images: np.ndarray
    ) -> None:
        # With a code the parity may be quicker than a data task.
        async with serving(mnist, policy="uncoded") as service:
            began = time.monotonic()
            response = await service.infer(images[:3])
            elapsed = 1000 * (time.monotonic() - began)
            header = response.headers["Server-Timing"]
            found = re.fullmatch(r"work;dur=([\d.]+)", header)
            assert found is not None, header
            assert 0 < float(found.group(1)) < elapsed

    async def test_a_large_answer_is_compressed_for_who_asks(
        self, mnist: Bundle, images: np.ndarray
    ) -> None:
        async with serving(mnist) as service:
            batch = np.repeat(images[:1], 32, axis=0)
            for asked, given in (("gzip", "gzip"), ("identity", None), ("gzip; q=0, br", None)):
                service.client.headers["Accept-Encoding"] = asked
                response = await service.infer(batch)
                assert response.headers.get("content-encoding") == given
                assert response.headers["vary"] == "Accept-Encoding"
                assert len(response.json()["outputs"][0]["data"]) == 320

    async def test_a_timeout_too_short_to_tell_from_none_is_over(
        self, mnist: Bundle, images: np.ndarray
    ) -> None:
        async with serving(mnist) as service:
            response = await service.infer(images[:1], parameters={"timeout": 1e-320})
            assert response.status_code == 504
            assert service.pool.calls == []


class TestBadRequests:
    async def test_what_the_parser_refuses_costs_nothing(
        self, mnist: Bundle, images: np.ndarray
    ) -> None:
        good, packed = tensor(images[:1]), {"Content-Encoding": "gzip"}
        bodies: list[tuple[dict[str, Any], str]] = [
            ({"inputs": [{**good, "shape": [1, 28, 28]}]}, "inputs.0.shape"),
            ({"inputs": [good], "parameters": {"timeout": -1}}, "parameters.timeout"),
        ]
        async with serving(mnist) as service:
            for content, headers, told in (
                *((json.dumps(made).encode(), {}, told) for made, told in bodies),
                (b"{", {}, "body: not valid JSON"),
                (b"{}", {HEADER_LENGTH: "3"}, f"{HEADER_LENGTH}: 3 is more than"),
                (b"{}", {"Content-Encoding": "br"}, "Content-Encoding: 'br'"),
                (b"{}", packed, "body: not valid gzip"),
                (gzip.compress(b"{}" * 99, mtime=0)[:-9], packed, "body: the gzip data"),
            ):
                response = await service.client.post(INFER, content=content, headers=headers)
                assert error(response, 400).startswith(told)
            assert not service.front.scheduler.queries

    async def test_a_body_that_is_too_large(self, mnist: Bundle) -> None:
        async with serving(mnist) as service:
            post, data = service.client.post, b" " * (MAX_BODY + 1)
            told = error(await post(INFER, content=data), 413)
            assert told.startswith("body: more than ")
            packed, headers = gzip.compress(data), {"Content-Encoding": "gzip"}
            told = error(await post(INFER, content=packed, headers=headers), 413)
            assert told.startswith("body: more than ")

    @pytest.mark.parametrize("binary", [False, True])
    async def test_bombs_do_not_stop_the_others(self, binary: bool, mnist: Bundle) -> None:
        bomb = gzip.compress(b'{"inputs": [' + b"[]," * 8_000_000 + b"0]}")
        headers = {"Content-Encoding": "gzip", **({HEADER_LENGTH: "24000015"} if binary else {})}
        largest = []  # of each round: the machine, too, may stand still
        began = time.process_time()
        json.loads(b"[" + b"[]," * 1_000_000 + b"0]")
        eighth = time.process_time() - began

        async with serving(mnist, max_body=30000000) as service:

            async def attack() -> None:
                post = service.client.post(INFER, content=bomb, headers=headers)
                assert error(await post, 413).startswith("body: more than")

            for _ in range(3):
                largest.append(await largest_gap(service, [attack() for _ in range(6)]))
        assert min(largest) < eighth / 3, (largest, eighth)


class TestNotFound:
    @pytest.mark.parametrize(
        "path",
        [
            "/v2/models/MNIST",
            "/v2/models/mnist/versions/2",
            "/v2/models/mnist/versions/2/ready",
            "/v2/models/fashion/ready",
            "/nowhere",
            "/v2/nowhere",
            "/docs",
            "/openapi.json",
            "/demo/requests",
        ],
    )
    async def test_get(self, path: str, mnist: Bundle) -> None:
        async with serving(mnist) as service:
            assert error(await service.client.get(path), 404)

    async def test_infer(self, mnist: Bundle) -> None:
        async with serving(mnist) as service:
            post = service.client.post
            message = error(await post("/v2/models/Fashion/infer", json={}), 404)
            assert message == "no model 'Fashion' version '1'; there is 'mnist' 1"
            error(await post("/v2/models/mnist/versions/2/infer", json={}), 404)
            error(await post("/demo/workers/0/kill"), 404)

    async def test_wrong_method(self, mnist: Bundle) -> None:
        async with serving(mnist) as service:
            response = await service.client.get(INFER)
            error(response, 405)
            assert response.headers["allow"] == "POST"
            error(await service.client.post("/metrics"), 405)
