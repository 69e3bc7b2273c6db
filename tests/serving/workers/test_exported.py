"""ONNX Runtime in a worker: the same outputs, exported once, shared by forked workers."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from multiprocessing import forkserver
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from codedinvnet.codes.base import Scheme
from codedinvnet.codes.mean import LatentCode
from codedinvnet.codes.method import given_by
from codedinvnet.codes.registry import METHODS
from codedinvnet.common.engines import ENGINES, ONNX_RUNTIME, check_engine, check_installed
from codedinvnet.common.errors import UserError
from codedinvnet.common.processes import descendants
from codedinvnet.data import sample_images
from codedinvnet.models import runtime
from codedinvnet.models.bundle import load_bundle
from codedinvnet.serving.config import ServeOptions
from codedinvnet.serving.opened import check, make_pool, open_served
from codedinvnet.serving.served import IMAGES
from codedinvnet.serving.workers import exported
from codedinvnet.serving.workers.computing import BundleSpec, SchemeComputer
from codedinvnet.serving.workers.exported import Exported, ExportedModule, run_by_onnxruntime
from codedinvnet.serving.workers.local import ProcessPool
from codedinvnet.serving.workers.pool import Task
from tests.processes import ended, needs_proc, survivors, wait_until
from tests.serving.bundles import output
from tests.serving.workers.worker_processes import end_fork_server

K = 4


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(autouse=True)
def _own_cache(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CODEDINVNET_CACHE", str(cache))


def refuse_to_export(*_: Any, **__: Any) -> None:
    raise RuntimeError("this is exported anew")


def groups(shape: Sequence[int], count: int, members: int) -> Tensor:
    return torch.rand(count, members, *shape, generator=torch.Generator().manual_seed(0))


class ByPyTorch(Exported):
    """In the place of an export, which takes seconds: notes the shapes it computes."""

    def __init__(self, module: nn.Module, examples: Sequence[Tensor]) -> None:
        self.module, self.shapes = module, [example.shape for example in examples]
        self.seen: list[tuple[int, ...]] = []

    def __call__(self, *inputs: Tensor) -> list[Tensor]:
        self.seen.append(tuple(inputs[0].shape))
        found = self.module(*inputs)
        return list(found) if isinstance(found, tuple) else [found]


def loaded(spec: BundleSpec) -> Scheme:
    computer = spec.load()
    assert isinstance(computer, SchemeComputer)
    return computer.scheme


def test_the_outputs_are_those_of_pytorch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of `cifar10`; `mnist` is compared in the workers, below."""
    plain = loaded(BundleSpec("cifar10", K))
    fast = loaded(BundleSpec("cifar10", K, engine=ONNX_RUNTIME))
    assert isinstance(fast.code, LatentCode)
    shape = fast.shape
    shapes: list[torch.Size] = []
    run = Exported.__call__

    def noted(self: Exported, *inputs: Tensor) -> list[Tensor]:
        shapes.append(inputs[0].shape)
        return run(self, *inputs)

    monkeypatch.setattr(Exported, "__call__", noted)
    padded = fast.code.model.input_shape
    for number, count, members, computed in (
        (0, 1, 1, [(1, *padded)]),
        (K, 1, K, [(1, K, *padded), (1, *padded)]),
        (K, 1, K - 1, [(1, *padded)]),  # E by PyTorch
        (0, 2, 1, []),
    ):
        shapes.clear()
        queries = groups(shape, count, members)
        found = fast.compute(number, queries).output
        torch.testing.assert_close(
            found, plain.compute(number, queries).output, rtol=1e-4, atol=1e-4
        )
        assert [tuple(shape) for shape in shapes] == computed
    direct, expected = fast.direct(found), plain.direct(found)
    assert direct is not None
    assert expected is not None
    assert torch.equal(direct, expected)  # heads are as they were


def test_an_export_is_kept_until_the_weights_change(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = nn.Conv2d(1, 2, 3).eval().requires_grad_(False)
    example = torch.zeros(1, 1, 5, 5)
    x = torch.rand(1, 1, 5, 5)
    before = set((cache / "onnx").glob("*")) if (cache / "onnx").is_dir() else set()
    monkeypatch.delenv("ORT_DISABLE_TELEMETRY", raising=False)
    Exported(module, [example])
    assert os.environ["ORT_DISABLE_TELEMETRY"] == "1"
    (kept,) = set((cache / "onnx").glob("*")) - before
    exporter = torch.onnx.export
    monkeypatch.setattr(torch.onnx, "export", refuse_to_export)
    torch.testing.assert_close(Exported(module, [example])(x)[0], module(x))
    with pytest.raises(UserError, match=r"cannot export Conv2d: this is exported anew"):
        Exported(module, [torch.zeros(1, 1, 6, 6)])
    weight = module.weight.clone()
    module.weight.add_(1)
    with pytest.raises(UserError, match="anew"):
        Exported(module, [example])
    monkeypatch.setattr(torch.onnx, "export", exporter)
    torch.testing.assert_close(Exported(module, [example])(x)[0], module(x))

    kept.write_bytes(b"cut short")
    module.weight.copy_(weight)
    torch.testing.assert_close(Exported(module, [example])(x)[0], module(x))
    assert len(kept.read_bytes()) > 100


def test_an_export_that_onnx_runtime_cannot_run_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runtime, "export", lambda *_: b"no model")
    with pytest.raises(UserError, match="the engine onnxruntime cannot run Identity: "):
        Exported(nn.Identity(), [torch.zeros(1, 3)])


def made(name: str) -> Scheme:
    """Return a scheme of the shipped model; trained parts are as they were initialised."""
    method, given = METHODS[name], given_by(load_bundle("mnist"), K)
    if method.part:
        torch.manual_seed(0)
        made_with = {"width": 3, "encoder": {"kind": "lean", "width": 4}}
        part = method.untrained(given, made_with).eval().requires_grad_(False)
        given = replace(given, part=part)
    return method.build(given)


@pytest.mark.parametrize("name", METHODS)
def test_every_method_is_run_by_it(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exported, "Exported", ByPyTorch)
    plain, fast = made(name), made(name)
    run_by_onnxruntime(fast.networks())
    networks = [network.module for network in fast.networks()]
    assert all(isinstance(module, ExportedModule) for module in networks)
    for model in fast.models.values():
        assert any(isinstance(part, ExportedModule) for part in model.modules())
    group = groups((1, 28, 28), 1, K)
    for number, task in fast.rules.tasks(K).items():
        queries = group[:, list(task.members)]
        found, expected = (one.compute(number, queries).output for one in (fast, plain))
        torch.testing.assert_close(found, expected)
    seen = {shape for module in networks for shape in module.exported.seen}  # type: ignore[union-attr]
    assert (1, 1, 32, 32) in seen
    assert ((1, K, 1, 32, 32) in seen) == any(len(n.examples) > 1 for n in plain.networks())


def maps_onnxruntime(pid: int) -> bool:
    return "onnxruntime" in Path(f"/proc/{pid}/maps").read_text()


@needs_proc
def test_workers_share_what_was_exported_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a cache of its own, which a process fills; the fork server then has the sessions."""
    monkeypatch.setenv("CODEDINVNET_CACHE", str(tmp_path))
    end_fork_server()  # of earlier tests
    images = sample_images("mnist").images[:K].numpy()
    plain = loaded(BundleSpec("mnist", K))
    wanted = plain.compute(0, torch.from_numpy(images[:1])[None]).output.numpy()[0]
    parity = plain.compute(K, torch.from_numpy(images)[None]).output.numpy()[0]

    async def main() -> None:
        options = ServeOptions(source="mnist", k=K, engine=ONNX_RUNTIME)
        pool = make_pool(options, open_served(options).spec)
        assert isinstance(pool, ProcessPool)
        assert not pool.spec.is_prepared()
        await pool.start(2)
        assert pool.spec.is_prepared()
        try:
            pids = [pool.pid(worker) for worker in range(2)]
            assert all(maps_onnxruntime(pid) for pid in pids if pid is not None)
            server = forkserver._forkserver._forkserver_pid  # type: ignore[attr-defined]
            assert maps_onnxruntime(server)
            assert len(os.listdir(f"/proc/{server}/task")) == 1  # no thread of a reporter's
            for _ in range(2):
                one = await pool.call(0, Task(1, 0, {IMAGES: images[:1]}))
                all_of_them = await pool.call(1, Task(2, K, {IMAGES: images}))
                np.testing.assert_allclose(output(one), wanted, rtol=1e-4, atol=1e-4)
                np.testing.assert_allclose(output(all_of_them), parity, rtol=1e-4, atol=1e-4)
                pid = pool.pid(0)
                assert pid is not None
                os.kill(pid, signal.SIGKILL)
                await pool.replace(0)
        finally:
            await pool.stop()

    asyncio.run(asyncio.wait_for(main(), 200))
    assert len(list((tmp_path / "onnx").iterdir())) == 2  # f and E
    end_fork_server()  # which has the sessions, and this test's cache


@needs_proc
def test_a_stop_while_the_cache_is_filled_ends_at_once(tmp_path: Path) -> None:
    environment = {**os.environ, "CODEDINVNET_CACHE": str(tmp_path)}
    words = ("serve", "mnist", "--set", f"engine={ONNX_RUNTIME}", "--port", "0")
    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "codedinvnet", *words],
            stdout=log,
            stderr=log,
            env=environment,
            start_new_session=True,
        )
    text = (tmp_path / "log").read_text
    with ended(process):
        assert wait_until(lambda: "preparing the engine" in text(), 60)
        below = descendants(process.pid)
        os.killpg(process.pid, signal.SIGINT)
        began = time.monotonic()
        assert process.wait(60) == 0
    assert time.monotonic() - began < 30
    assert survivors(below) == []
    assert "Traceback" not in text()
    assert not list(tmp_path.glob("onnx/*"))


def test_what_an_engine_cannot_do_is_said_before_anything_starts(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    check(ServeOptions(source="mnist", engine=ONNX_RUNTIME))
    for pool in ("local", "ray"):
        told = "the engine onnxruntime computes on processors only, not on cuda"
        with pytest.raises(UserError, match=told):
            check(ServeOptions(source="mnist", engine=ONNX_RUNTIME, device="cuda", pool=pool))
    lacking = replace(ENGINES[ONNX_RUNTIME], needed=("onnx", "nowhere_to_be_found"))
    monkeypatch.setitem(ENGINES, ONNX_RUNTIME, lacking)
    told = r"engine onnxruntime needs nowhere_to_be_found: pip install 'codedinvnet\[onnx\]'"
    with pytest.raises(UserError, match=told):
        check(ServeOptions(source="mnist", engine=ONNX_RUNTIME))
    for step in (BundleSpec.load, BundleSpec.is_prepared):
        with pytest.raises(UserError, match=told):
            step(BundleSpec("mnist", K, engine=ONNX_RUNTIME))
    check(
        ServeOptions(source="mnist", engine=ONNX_RUNTIME, pool="ray")
    )  # its nodes tell for themselves
    check_engine("pytorch", "cuda")
    check_installed("pytorch")
