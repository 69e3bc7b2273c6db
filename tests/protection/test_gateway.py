"""The small backup of a protection answers a gateway's late requests, from a server of its own."""

from __future__ import annotations

import asyncio
import json
import shutil
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from codedinvnet.cli import main
from codedinvnet.gateway.options import GatewayOptions
from codedinvnet.gateway.run import running
from codedinvnet.models import open_model
from codedinvnet.protection.folder import DESCRIPTION
from tests.protection.conftest import description
from tests.protection.factories import FEATURES
from tests.upstream import Reply, Request, Toy

PATH = "/v2/models/vectors/infer"
WRONG = [0, 0, 1]


def changed(folder: Path, to: Path, **more: object) -> Path:
    """Copy a protection whose description says something else of its model, or of all."""
    shutil.copytree(folder, to)
    found = description(folder)
    model = {**found["model"], **{key: more.pop(key) for key in ("output",) if key in more}}
    (to / DESCRIPTION).write_text(json.dumps({**found, "model": model, **more}))
    return to


async def test_late_requests_get_the_backups_answer(finished: Path) -> None:
    folder, name = finished, description(finished)["model"]["output"]
    x = np.random.default_rng(5).random((1, FEATURES), np.float32)
    backup = open_model(folder / f"{description(folder)['recommended']}.onnx")
    wanted = backup.run({"x": x})[name][0].tolist()

    def upstream(request: Request) -> Reply:
        """Answer wrongly, so that one sees who did, and let every fourth request wait."""
        tensor = {"name": name, "datatype": "FP32", "shape": [1, 3], "data": WRONG}
        late = request.path == PATH and request.number > 200 and request.number % 4 == 0
        content = json.dumps({"model_name": "vectors", "outputs": [tensor]}).encode()
        return Reply(content, type="application/json", delay=1.0 if late else 0.005)

    tensor = {"name": "x", "datatype": "FP32", "shape": [1, FEATURES], "data": x[0].tolist()}
    async with Toy(upstream) as one, Toy(upstream) as two:
        options = GatewayOptions(upstream=(one.url, two.url), port=0, protection=folder)
        async with running(options) as found, httpx.AsyncClient(base_url=found.url) as client:

            async def ask() -> str:
                reply = await client.post(PATH, json={"inputs": [tensor]}, timeout=30)
                output = next(one for one in reply.json()["outputs"] if one["name"] == name)
                outcome = reply.headers.get("codedinvnet-outcome", "direct")
                expected = wanted if outcome == "fallback" else WRONG
                assert output["data"] == pytest.approx(expected, rel=1e-3)
                return str(outcome)

            outcomes: list[str] = []
            end = asyncio.get_running_loop().time() + 60
            while outcomes.count("fallback") < 3 and asyncio.get_running_loop().time() < end:
                outcomes.append(await ask())
            assert outcomes.count("fallback") == 3


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"recommended": None, "reason": "none is better"}, "none is better"),
        ({"recommended": "other"}, "no backup 'other'"),
        ({"output": None}, "not a protection"),
        ({"model": {"source": "models/resnet.onnx"}}, "not a protection"),
        (None, "cannot read"),
    ],
)
def test_what_is_no_protection(
    more: dict[str, Any] | None,
    said: str,
    finished: Path,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    folder = changed(finished, tmp_path / "protection", **(more or {}))
    if more is None:
        (folder / f"{description(folder)['recommended']}.onnx").write_bytes(b"no graph")
    words = ("--port", "0", "--upstream", "http://127.0.0.1:1", "--protection", str(folder))
    assert main(["gateway", *words]) == 2
    lines = [line for line in capfd.readouterr().err.splitlines() if not line.startswith("{")]
    assert len(lines) == 1
    assert lines[0].startswith("error: --protection: ")
    assert said in lines[0]
