"""The example of a Ray Serve ingress, on a cluster of its own on this machine."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from codedinvnet.errors import UserError
from codedinvnet.processes import free_port

pytest.importorskip("ray.serve", reason="ray[serve] is not installed")

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


def test_options_that_the_example_could_not_heed(tmp_path: Path) -> None:
    """Refused, or looked at, before Ray is asked for anything."""
    from examples.ray_serve import app

    with pytest.raises(UserError, match="token_fiel: no option of serve: did you mean"):
        app({"token_fiel": "secret"})
    with pytest.raises(UserError, match=r"^k: Input should be a valid integer.*, got 'many'$"):
        app({"k": "many"})
    for option in ("host", "port"):
        with pytest.raises(UserError, match=f"{option}: Ray Serve listens"):
            app({option: "1"})
    with pytest.raises(UserError, match="--token-file: cannot read"):
        app({"token_file": str(tmp_path / "none")})


def test_the_examples_events_are_told_as_serve_tells_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without its handler, events would lose their fields."""
    from ray import serve

    from examples import ray_serve

    made: list[Any] = []
    called: list[str] = []

    def ingress(make: Any) -> Any:
        made.append(make)
        return lambda cls: cls

    monkeypatch.setattr(serve, "ingress", ingress)
    for name in ("log_to_stderr", "freeze_loaded"):
        monkeypatch.setattr(ray_serve, name, lambda name=name: called.append(name))
    ray_serve.app({"source": "mnist", "k": "2", "allowed_host": "a.example,b.example"})
    assert called == []  # here is not where it runs
    made[0]()
    assert called == ["log_to_stderr", "freeze_loaded"]


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
