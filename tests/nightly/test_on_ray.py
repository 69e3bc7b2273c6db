"""What takes minutes on Ray: a lost node, a protected model, and an ingress of Ray Serve."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import torch

from codedinvnet.common.faults import Fault
from codedinvnet.data import sample_images
from codedinvnet.models import open_model
from codedinvnet.net.listening import free_port
from codedinvnet.protection import load_protection
from codedinvnet.serving.config import ServeOptions
from tests.client import connect
from tests.e2e.test_ray import NODE, raylet
from tests.e2e.test_ray import cluster as cluster
from tests.processes import needs_proc, server
from tests.protection.conftest import PLACE
from tests.protection.conftest import finished as finished
from tests.protection.factories import FEATURES
from tests.protection.test_served import LATE, answers

pytestmark = pytest.mark.nightly

ROOT = Path(__file__).resolve().parents[2]
PROGRAM = """
import json, sys
import ray, torch
import tritonclient.http as triton
from ray import serve
from codedinvnet.data import sample_images
from examples.ray_serve import app

ray.init("local", num_cpus=2, include_dashboard=False, log_to_driver=False)
serve.start(http_options={"host": "127.0.0.1", "port": int(sys.argv[1])})
try:
    serve.run(app({"source": "mnist", "k": "2", "deadline_ms": "9000"}))
    client = triton.InferenceServerClient("127.0.0.1:" + sys.argv[1])
    images, labels = sample_images("mnist").batch(torch.arange(20))
    tensor = triton.InferInput("images", list(images.shape), "UINT8")
    tensor.set_data_from_numpy(images.numpy())
    answer = client.infer("mnist", [tensor])
    right = int((answer.as_numpy("label") == labels.numpy()).sum())
    outcomes = sorted({outcome.decode() for outcome in answer.as_numpy("outcome")})
    report = {"ready": client.is_server_ready(), "right": right, "outcomes": outcomes}
    print("REPORT", json.dumps(report))
finally:
    serve.shutdown()
    ray.shutdown()
"""


@needs_proc
async def test_the_front_ends_own_node_is_lost(cluster: Any, tmp_path: Path) -> None:
    """All actors end with it; the service says so, and goes on when there is a node again."""
    images = sample_images("mnist").images.numpy()
    options = f"--k 2 --workers 3 --pool ray --set ray-address={cluster.address}".split()
    times = ("--deadline-ms", "30000", "--set", "down-timeout-ms=3000")
    log = tmp_path / "log"

    async with (
        server("mnist", *options, *times, log=log) as process,
        connect(process.address, "mnist", images) as client,
        httpx.AsyncClient(base_url=process.address) as http,
    ):

        async def until_live(status: int, seconds: float) -> None:
            end = time.monotonic() + seconds
            while (await http.get("/v2/health/live")).status_code != status:
                assert time.monotonic() < end
                await asyncio.sleep(0.1)

        assert (await client.infer("before", range(4))).ok
        for node in (cluster.head_node, *cluster.worker_nodes):
            os.kill(raylet(node), signal.SIGKILL)
        await until_live(503, 60)
        began = time.monotonic()
        reply = await client.infer("between", range(4))
        assert reply.status == 503
        assert time.monotonic() - began < 1

        cluster.add_node(**NODE, wait=False)
        await until_live(200, 120)
        assert (await client.infer("after", range(4))).ok
        process.process.send_signal(signal.SIGTERM)
        printed, _ = await asyncio.to_thread(process.process.communicate, timeout=60)
    assert "aylet" not in printed
    for line in log.read_text().splitlines():
        assert isinstance(json.loads(line), dict), line


def test_the_example_answers_through_ray_serve(tmp_path: Path) -> None:
    port = free_port()
    environment = {
        **os.environ,
        "RAY_AUTH_MODE": "disabled",
        "RAY_USAGE_STATS_ENABLED": "0",
        "PYTHONPATH": os.pathsep.join([str(ROOT / "src"), str(ROOT)]),
    }
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(port)],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=240,
    )
    lines = [line for line in done.stdout.splitlines() if line.startswith("REPORT ")]
    assert lines, done.stdout[-2000:] + done.stderr[-2000:]
    report = json.loads(lines[0].removeprefix("REPORT "))
    assert report["ready"] is True
    assert report["right"] >= 18
    assert set(report["outcomes"]) <= {"direct", "decoded", "guessed"}


def test_actors_make_up_for_a_late_one(
    cluster: Any, finished: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = f"{PLACE}:vectors"
    monkeypatch.setenv("PYTHONPATH", f"{Path.cwd()}/src:{Path.cwd()}")
    x = np.random.default_rng(3).random((4, FEATURES), np.float32)
    model = open_model(source)
    options = ServeOptions(
        source=source,
        protection=finished,
        method="small-backup",
        pool="ray",
        ray_address=cluster.address,
        demo=True,
        deadline_ms=60_000,
    )
    found = answers(options, {"x": x}, Fault(kind="hang", worker=LATE))
    assert found["outcome"].tolist() == [b"direct", b"decoded", b"direct", b"direct"]
    for i in (0, 2, 3):
        own = model.run({"x": x[i : i + 1]})["output"]
        assert found["output"][i].tobytes() == own.tobytes()
    scheme = load_protection(finished, model, "small-backup")
    outputs = {
        number: scheme.compute(number, torch.from_numpy(x[list(task.members)])[None]).output
        for number, task in scheme.rules.tasks(4).items()
        if number != LATE
    }
    assert found["output"][1] == pytest.approx(scheme.decode(outputs, 4)[1][0].numpy(), abs=1e-4)
