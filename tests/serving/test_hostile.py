"""Models and folders that would keep a service from starting, or change what it answers."""

from __future__ import annotations

import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from codedinvnet.codes.build import scheme_for
from codedinvnet.errors import UserError
from codedinvnet.models.bundle import load_bundle
from codedinvnet.protocol.messages import InferRequest
from codedinvnet.serving import app as serving
from codedinvnet.serving.app import open_app
from codedinvnet.serving.config import ServeOptions
from codedinvnet.serving.opened import open_served
from tests.models.factories import PLACE

POOL = "examples/my_pool.py:Pool"


def endless(path: Path) -> Path:
    """Write a classifier whose graph has a loop without an end."""
    floats = TensorProto.FLOAT
    body = helper.make_graph(
        [
            helper.make_node("Identity", ["cond_in"], ["cond_out"]),
            helper.make_node("Identity", ["y_in"], ["y_out"]),
        ],
        "body",
        [
            helper.make_tensor_value_info("i", TensorProto.INT64, []),
            helper.make_tensor_value_info("cond_in", TensorProto.BOOL, []),
            helper.make_tensor_value_info("y_in", floats, None),
        ],
        [
            helper.make_tensor_value_info("cond_out", TensorProto.BOOL, []),
            helper.make_tensor_value_info("y_out", floats, None),
        ],
    )
    graph = helper.make_graph(
        [helper.make_node("Loop", ["", "true", "x"], ["y"], body=body)],
        "endless",
        [helper.make_tensor_value_info("x", floats, ["B", 3])],
        [helper.make_tensor_value_info("y", floats, ["B", 3])],
        [numpy_helper.from_array(np.array(True), "true")],
    )
    opset = [helper.make_opsetid("", 17)]
    onnx.save(helper.make_model(graph, opset_imports=opset, ir_version=9), path)
    return path


def test_a_model_that_never_loads_is_given_up_with_a_line(tmp_path: Path) -> None:
    path = endless(tmp_path / "endless.onnx")
    code = (
        "from codedinvnet.serving import opened\n"
        "opened.SLOW_LOAD, opened.LONGEST_LOAD = 0.5, 2.0\n"
        "from codedinvnet.cli import main\n"
        f"main(['serve', {str(path)!r}, '--port', '0'])\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 2
    *lines, last = done.stderr.splitlines()
    assert last == f"error: {path} did not load in 2 s"
    assert all("loading the model takes long" in line for line in lines)


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
