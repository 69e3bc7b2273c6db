"""Models and folders that would keep a service from starting, or change what it answers."""

from __future__ import annotations

import time

import numpy as np
import pytest

from codedinvnet.net.protocol.messages import InferRequest
from codedinvnet.serving.app import open_app
from codedinvnet.serving.config import ServeOptions
from tests.models.factories import PLACE

POOL = "examples/my_pool.py:Pool"


@pytest.mark.parametrize("source", ["mnist", f"{PLACE}:mlp"])
async def test_what_is_served_by_default_answers_directly_bit_for_bit(source: str) -> None:
    answers = []
    for policy in (None, "uncoded"):
        app = open_app(ServeOptions(source=source, policy=policy, workers=11, pool=POOL))
        await app.dispatcher.start()
        try:
            (spec,) = app.service.served.signature.inputs
            rows = (200 * np.random.default_rng(1).random((7, *spec.shape))).astype(np.uint8)
            given = rows if spec.datatype == "UINT8" else rows.astype(np.float32)
            found = await app.service.answer(InferRequest({spec.name: given}), time.monotonic())
            answers.append(found.message.outputs)
        finally:
            await app.dispatcher.stop()
    assert set(answers[0]["outcome"].tolist()) == {b"direct"}
    for name, values in answers[0].items():
        assert values.tobytes() == answers[1][name].tobytes() or values.dtype == object
