"""`codedinvnet serve` with a model of a user's own, which loses a worker."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any
from urllib.request import urlopen

import numpy as np
import pytest

from codedinvnet.models import open_model
from tests.models import factories
from tests.models.factories import save_onnx
from tests.processes import served, wait_until


def state(address: str) -> dict[str, Any]:
    with urlopen(f"{address}/page/state", timeout=10) as reply:
        found: dict[str, Any] = json.load(reply)
    return found


def test_an_onnx_file_is_served_through_a_worker_that_is_killed(tmp_path: Path) -> None:
    triton = pytest.importorskip("tritonclient.http")
    path = save_onnx(factories.resnet, tmp_path / "resnet.onnx")
    model = open_model(path)
    images = np.random.default_rng(3).random((8, 3, 32, 32), np.float32)
    own = [model.run({"x": images[i : i + 1]})["logits"] for i in range(len(images))]
    options = ("--workers", "3", "--policy", "hedge", "--deadline-ms", "30000")
    with served(str(path), *options, log=tmp_path / "log") as process:
        address = process.address.removeprefix("http://")
        with triton.InferenceServerClient(address, network_timeout=60.0) as client:
            (tensor,) = client.get_model_metadata("resnet")["inputs"]
            assert tensor == {"name": "x", "datatype": "FP32", "shape": [-1, 3, 32, 32]}
            asked = triton.InferInput("x", list(images.shape), "FP32")
            asked.set_data_from_numpy(images)
            os.kill(state(process.address)["workers"][0]["pid"], signal.SIGKILL)
            for _ in range(10):
                found = client.infer("resnet", [asked]).as_numpy("logits")
                assert found.tobytes() == np.concatenate(own).tobytes()

        def are_up() -> bool:
            return [w["state"] for w in state(process.address)["workers"]] == ["up"] * 3

        assert wait_until(are_up, 60)
        page = state(process.address)
        assert page["answers"]["direct"] == 10 * len(images)
        assert page["k"] == 1
        assert page["workers"][0]["restarts"] == 1
