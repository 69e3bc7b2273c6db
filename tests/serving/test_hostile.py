"""Models and folders that would keep a service from starting, or change what it answers."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from codedinvnet.codes.build import scheme_for
from codedinvnet.common.errors import UserError
from codedinvnet.models.bundle import load_bundle
from codedinvnet.net.protocol.messages import InferRequest
from codedinvnet.serving import app as serving
from codedinvnet.serving.app import open_app
from codedinvnet.serving.config import ServeOptions
from codedinvnet.serving.opened import open_served
from tests.models.factories import PLACE

POOL = "examples/my_pool.py:Pool"


def test_a_folder_whose_method_replaces_direct_answers_is_not_served_by_default(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Whatever a protection says: the policy auto changes no direct answer."""
    opened = open_served(ServeOptions(source="mnist", k=4))
    coded = replace(opened, scheme=scheme_for(load_bundle("mnist"), 4, "nercc"))
    monkeypatch.setattr(serving, "open_served", lambda _: coded)
    options = ServeOptions(source=f"{PLACE}:mlp", protection=tmp_path, pool=POOL)
    with pytest.raises(UserError, match="--policy: nercc has no direct answers"):
        open_app(options)


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
