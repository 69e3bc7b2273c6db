"""Requests that a gateway's small backup does not answer, for what they ask for."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from codedinvnet.models.upstream import described
from tests.protect.conftest import finished  # noqa: F401
from tests.serving.gateway.asking import Got, ask
from tests.serving.gateway.fakes import gateway
from tests.serving.gateway.servers import (
    LENGTH,
    MODEL,
    SMALL,
    Beside,
    Server,
    asked,
    queries,
    scores,
)
from tests.serving.gateway.test_protection import refused

TEXTS = {"name": "label", "datatype": "BYTES", "shape": [-1, 1]}
OWN = {"name": "outcome", "datatype": "BYTES", "shape": [-1]}


def labels() -> Server:
    """Tells a label as a text beside the scores, as classifiers of scikit-learn do."""
    return Beside(TEXTS, b"\x01\0\0\0a")


async def asked_for(address: str, x: np.ndarray, *names: str) -> Got:
    """Ask for some outputs alone, or for all."""
    head, blobs = described({"x": x}, MODEL.signature.inputs)
    told: dict[str, Any] = json.loads(head)
    if names:
        told["outputs"] = [{"name": name} for name in names]
    text = json.dumps(told).encode()
    return await ask(address, text + b"".join(blobs), **{LENGTH: str(len(text))})


async def test_texts_are_outputs_as_others_are(finished: Path) -> None:  # noqa: F811
    """Who asks for them waits for an upstream, and who names no outputs asks for all."""
    server = labels()
    async with gateway(server, protection=finished, **SMALL) as (address, _, _):
        server.hold()
        assert scores(await asked_for(address, queries(1), "output"))[1] == "decoded"
        for names in ((), ("output", "label")):
            asking = asyncio.create_task(asked_for(address, queries(1), *names))
            done, _ = await asyncio.wait({asking}, timeout=0.3)
            assert not done
            server.go()
            got = await asking
            assert scores(got)[1] == "direct"
            assert b'"label"' in got.body
            server.hold()
        server.go()


async def test_the_outcome_of_a_service_is_no_output_of_its_model(finished: Path) -> None:  # noqa: F811
    server = Server()
    server.metadata["outputs"].append(OWN)
    async with gateway(server, protection=finished, **SMALL) as (address, _, _):
        server.hold()
        assert scores(await asked_for(address, queries(1)))[1] == "decoded"
        server.go()


async def test_a_code_does_not_answer_for_texts(finished: Path) -> None:  # noqa: F811
    """One without direct answers has no other outputs than the scores anyway."""
    told = r"m answers with texts \(label\), which answers around code would lack"
    await refused(told, *(labels() for _ in range(5)), protection=finished, method="code")
    async with gateway(*(labels() for _ in range(5)), method="approxifer") as (address, _, _):
        assert scores(await asked_for(address, queries(4)))[1] == "decoded"


async def test_who_has_parameters_that_the_backup_does_not_know_waits_for_an_upstream(
    finished: Path,  # noqa: F811
    caplog: pytest.LogCaptureFixture,
) -> None:
    """They may change what the model says."""
    server = Server()
    async with gateway(server, protection=finished, **SMALL) as (address, _, _):
        server.hold()
        usual: dict[str, Any] = {
            "priority": 1,
            "timeout": 10**7,
            "sequence_id": 0,
            "content_type": "np",
        }
        assert scores(await asked(address, queries(1), **usual))[1] == "decoded"
        waits = asyncio.create_task(asked(address, queries(1), threshold=0.8))
        done, _ = await asyncio.wait({waits}, timeout=0.3)
        assert not done
        server.go()
        assert scores(await waits)[1] == "direct"
    told = [vars(record)["fields"] for record in caplog.records if "backup" in record.msg]
    assert ["parameters: 'threshold': the mod" in line["reason"] for line in told] == [True]


async def test_so_does_who_has_a_query_in_the_url(finished: Path) -> None:  # noqa: F811
    server = Server()
    head, blobs = described({"x": queries(1)}, MODEL.signature.inputs)
    body, path = head + b"".join(blobs), "/v2/models/m/infer?threshold=0.8"
    async with gateway(server, protection=finished, **SMALL) as (address, _, _):
        server.hold()
        waits = asyncio.create_task(ask(address, body, path, **{LENGTH: str(len(head))}))
        done, _ = await asyncio.wait({waits}, timeout=0.3)
        assert not done
        server.go()
        assert scores(await waits)[1] == "direct"


async def test_the_log_says_why_the_backup_answers_nobody(
    finished: Path,  # noqa: F811
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Once, however many such requests there are, and not for those that want no such answer."""

    def reasons() -> list[str]:
        told = [vars(record) for record in caplog.records]
        return [line["fields"]["reason"] for line in told if "small backup" in line["msg"]]

    for names, x, reason in (
        ((), queries(1), "outputs: it lacks label: name output alone"),
        (("output",), queries(1)[:, :5], "'x' must be [B, 12] with B >= 1, got [1, 5]"),
    ):
        caplog.clear()
        async with gateway(labels(), protection=finished, **SMALL) as (address, _, _):
            await asked(address, queries(1), accept_decoded=False)
            assert not reasons()
            for _ in range(3):
                await asked_for(address, x, *names)
            (told,) = reasons()
            assert reason in told
