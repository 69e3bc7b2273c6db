"""The small backup of a protection answers late requests, from a server of its own."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from codedinvnet.cli import main
from codedinvnet.gateway.options import GatewayOptions
from codedinvnet.gateway.run import running
from tests.toys import Reply, Request, Toy

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")
PATH = "/v2/models/resnet/infer"
WEIGHTS = np.arange(12, dtype=np.float32).reshape(4, 3)


def write(folder: Path, **changed: object) -> Path:
    """Write a protection whose backup multiplies by WEIGHTS."""
    helper = onnx.helper
    given = helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, ["n", 4])
    found = helper.make_tensor_value_info("logits", onnx.TensorProto.FLOAT, ["n", 3])
    product = helper.make_node("MatMul", ["x", "w"], ["logits"])
    weights = onnx.numpy_helper.from_array(WEIGHTS, "w")
    graph = helper.make_graph([product], "student", [given], [found], [weights])
    opset = helper.make_opsetid("", 17)
    folder.mkdir()
    onnx.save(helper.make_model(graph, opset_imports=[opset], ir_version=8), folder / "small.onnx")
    model = {"source": "models/resnet.onnx", "scores": "scores", "kind": "probabilities"}
    row = {"method": "small", "scores": "logits:logits"}
    description = {"model": model, "recommended": "small", "table": [row], "reason": ""}
    (folder / "protection.json").write_text(json.dumps({**description, **changed}))
    return folder


def upstream(request: Request) -> Reply:
    """Answer wrongly, so that one sees who did, and let every fourth request wait."""
    tensor = {"name": "scores", "datatype": "FP32", "shape": [1, 3], "data": [0, 0, 1]}
    late = request.path == PATH and request.number > 200 and request.number % 4 == 0
    body = json.dumps({"model_name": "resnet", "outputs": [tensor]}).encode()
    return Reply(body, type="application/json", delay=1.0 if late else 0.005)


async def test_late_requests_get_the_backups_answer(tmp_path: Path) -> None:
    x = [0.1, 0.2, 0.3, 0.4]
    scores = np.exp(np.array(x) @ WEIGHTS)
    tensor = {"name": "x", "datatype": "FP32", "shape": [1, 4], "data": x}
    body = json.dumps({"inputs": [tensor]})
    async with Toy(upstream) as one, Toy(upstream) as two:
        options = GatewayOptions(
            upstream=(one.url, two.url), port=0, protection=write(tmp_path / "protection")
        )
        async with running(options) as found, httpx.AsyncClient(base_url=found.url) as client:

            async def ask() -> str:
                reply = await client.post(PATH, content=body, timeout=30)
                output = next(one for one in reply.json()["outputs"] if one["name"] == "scores")
                outcome = reply.headers.get("codedinvnet-outcome", "direct")
                expected = scores / scores.sum() if outcome == "fallback" else [0, 0, 1]
                assert output["data"] == pytest.approx(expected, rel=1e-3)
                return str(outcome)

            told: list[str] = []
            end = asyncio.get_running_loop().time() + 60
            while told.count("fallback") < 3 and asyncio.get_running_loop().time() < end:
                told.append(await ask())
            assert told.count("fallback") == 3


ROW = {"method": "ghost", "scores": "logits:logits"}


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"recommended": None, "reason": "none is better"}, "none is better"),
        ({"recommended": "other"}, "no backup 'other'"),
        ({"recommended": "ghost", "table": [ROW]}, "no backup 'ghost'"),
        ({"table": 7}, "not a protection"),
        ({"table": [{"method": "small"}]}, "not a protection"),
        ({"model": {"source": "models/resnet.onnx"}}, "not a protection"),
        (None, "cannot read"),
    ],
)
def test_what_is_no_protection(
    changed: dict[str, Any] | None, said: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    folder = write(tmp_path / "protection", **(changed or {}))
    if changed is None:
        (folder / "small.onnx").write_bytes(b"no graph")
    words = ("--port", "0", "--upstream", "http://127.0.0.1:1", "--protection", str(folder))
    assert main(["gateway", *words]) == 2
    lines = [line for line in capfd.readouterr().err.splitlines() if not line.startswith("{")]
    assert len(lines) == 1
    assert lines[0].startswith("error: --protection: ")
    assert said in lines[0]
