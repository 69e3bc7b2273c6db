"""`codedinvnet serve` as its users see it: a process, its protocol's own client, signals."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any
from urllib.error import HTTPError, URLError
from urllib.parse import urlsplit
from urllib.request import urlopen

import numpy as np
import pytest
import torch

from benchmarks.processes import descendants
from codedinvnet.data import sample_images
from codedinvnet.models.bundle import Bundle, load_bundle
from codedinvnet.net.listening import free_port
from tests.client import Client, connect
from tests.conftest import Command
from tests.processes import (
    PATIENT,
    alive,
    ended,
    interruptible,
    needs_proc,
    served,
    server,
    slow,
    survivors,
    wait_until,
    write_faults,
)

UNPACKED = {"response_compression_algorithm": "gzip"}
QUERIES, TASKS = "codedinvnet_queries_total{", "codedinvnet_tasks_total{"


@pytest.fixture(scope="module")
def images() -> np.ndarray:
    return sample_images("mnist").images.numpy()


@pytest.fixture(scope="module")
def labels() -> np.ndarray:
    return sample_images("mnist").labels.numpy()


@pytest.fixture(scope="module")
def mnist() -> Bundle:
    return load_bundle("mnist")


async def worker_pids(client: Client) -> list[int]:
    return [worker["pid"] for worker in (await client.get("page/state"))["workers"]]


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    http = pytest.importorskip("tritonclient.http")
    log = tmp_path_factory.mktemp("serve") / "log"
    timeouts = {"connection_timeout": 60.0, "network_timeout": 60.0}
    with served("mnist", "--k", "4", "--workers", "6", *PATIENT, log=log) as process:
        address = process.address.removeprefix("http://")
        with http.InferenceServerClient(address, concurrency=8, **timeouts) as found:
            yield found


class TestTriton:
    """The protocol's own client, unchanged."""

    def request(self, images: np.ndarray, binary: bool = True) -> list[Any]:
        import tritonclient.http as http

        datatype = {"uint8": "UINT8", "float32": "FP32"}[images.dtype.name]
        tensor = http.InferInput("images", list(images.shape), datatype)
        tensor.set_data_from_numpy(images, binary_data=binary)
        return [tensor]

    def wanted(self, binary: bool) -> list[Any]:
        import tritonclient.http as http

        names = ("probabilities", "label", "outcome")
        return [http.InferRequestedOutput(name, binary_data=binary) for name in names]

    def check(self, result: Any, mnist: Bundle, images: np.ndarray) -> None:
        """Check that direct answers are the bundle's, and of many the most are direct."""
        expected = mnist.classify(mnist.embed(torch.from_numpy(images))).numpy()
        outcomes = [as_text(outcome) for outcome in result.as_numpy("outcome")]
        direct = [i for i, outcome in enumerate(outcomes) if outcome == "direct"]
        assert set(outcomes) <= {"direct", "decoded", "guessed"}
        assert len(direct) >= len(images) / 2 or len(images) < 5
        probabilities, found = result.as_numpy("probabilities"), result.as_numpy("label")
        assert probabilities.shape == expected.shape
        np.testing.assert_allclose(probabilities[direct], expected[direct], atol=1e-5)
        np.testing.assert_array_equal(found, probabilities.argmax(1))

    def test_health(self, client: Any) -> None:
        assert client.is_server_live()
        assert client.is_server_ready()
        assert client.is_model_ready("mnist")
        assert client.is_model_ready("mnist", "1")
        assert not client.is_model_ready("other")

    def test_metadata(self, client: Any) -> None:
        metadata = client.get_server_metadata()
        assert metadata["name"] == "codedinvnet"
        assert "binary_tensor_data" in metadata["extensions"]
        model = client.get_model_metadata("mnist")
        assert model["inputs"] == [
            {"name": "images", "datatype": "UINT8", "shape": [-1, 1, 28, 28]}
        ]
        outputs = {output["name"]: output["shape"] for output in model["outputs"]}
        assert outputs == {"probabilities": [-1, 10], "label": [-1], "outcome": [-1]}

    @pytest.mark.parametrize(
        ("count", "floats", "binary", "options"),
        [
            *(
                (5, *flags, {})
                for flags in product((False, True), product((False, True), repeat=2))
            ),
            (1, False, None, {"model_version": "1"}),
            *(
                (200, False, (True, True), {"request_compression_algorithm": one, **UNPACKED})
                for one in ("gzip", "deflate")
            ),
        ],
    )
    def test_infer(
        self,
        count: int,
        floats: bool,
        binary: tuple[bool, bool] | None,
        options: dict[str, str],
        client: Any,
        mnist: Bundle,
        images: np.ndarray,
    ) -> None:
        """Requests and answers are binary or not, as they are asked for, or as they are usually."""
        batch, (sent, wanted) = images[:count], binary or (True, True)
        given = (batch / 255).astype(np.float32) if floats else batch
        outputs = {"outputs": self.wanted(wanted)} if binary else {}
        request = self.request(given, sent)
        result = client.infer("mnist", request, request_id="first of all", **outputs, **options)
        assert result.get_response()["id"] == "first of all"
        self.check(result, mnist, batch)

    def test_parameters(self, client: Any, images: np.ndarray) -> None:
        result = client.infer(
            "mnist",
            self.request(images[:9]),
            outputs=self.wanted(binary=True),
            parameters={"accept_decoded": False},
            timeout=30_000_000,
        )
        assert {as_text(outcome) for outcome in result.as_numpy("outcome")} == {"direct"}

    def test_concurrent_requests(self, client: Any, mnist: Bundle, images: np.ndarray) -> None:
        pending = [
            client.async_infer(
                "mnist",
                self.request(images[i : i + 3]),
                outputs=self.wanted(binary=True),
                request_id=f"request {i}",
            )
            for i in range(40)
        ]
        for i, request in enumerate(pending):
            result = request.get_result()
            assert result.get_response()["id"] == f"request {i}"
            self.check(result, mnist, images[i : i + 3])

    def test_errors(self, client: Any, images: np.ndarray) -> None:
        from tritonclient.utils import InferenceServerException

        with pytest.raises(InferenceServerException, match="no model 'other'"):
            client.infer("other", self.request(images[:1]))
        with pytest.raises(InferenceServerException, match=r"inputs\.0\.shape"):
            client.infer("mnist", self.request(np.zeros((1, 1, 5, 5), np.uint8)))


def as_text(value: bytes | str) -> str:
    return value.decode() if isinstance(value, bytes) else value


@needs_proc
async def test_every_query_is_answered_while_workers_fail(
    tmp_path: Path, images: np.ndarray, labels: np.ndarray
) -> None:
    options = ("--k", "4", "--workers", "6", "--policy", "coded", *PATIENT)
    times = ("--set", "group-timeout-ms=500", "--set", "hang-timeout-ms=1500")
    faults = write_faults(tmp_path, slow(1000, probability=0.2))

    async with (
        server("mnist", *options, *times, "--faults", faults, log=tmp_path / "log") as process,
        connect(process.address, "mnist", images) as client,
    ):
        pids = await worker_pids(client)

        async def hurt() -> None:
            await asyncio.sleep(1)
            os.kill(pids[2], signal.SIGKILL)
            await asyncio.sleep(1)
            os.kill(pids[4], signal.SIGSTOP)

        hurting = asyncio.create_task(hurt())
        replies = await client.load([[i] for i in range(120)], rate=20, seed=0, label="query")
        await hurting
        assert [reply.error for reply in replies] == [""] * len(replies)
        assert all(reply.returned == reply.identity for reply in replies)
        right: dict[str, list[bool]] = {"direct": [], "decoded": [], "guessed": []}
        for reply in replies:
            (row,) = reply.rows
            right[reply.outcomes[0]].append(bool(reply.labels[0] == labels[row]))
        print({name: f"{sum(r)} of {len(r)} right" for name, r in right.items()})
        assert len(right["decoded"]) >= 5
        assert np.mean(right["decoded"]) >= 0.8
        assert np.mean(right["direct"]) >= 0.9

        async def restarts() -> list[int]:
            return [worker["restarts"] for worker in (await client.get("page/state"))["workers"]]

        for _ in range(200):
            counts = await restarts()
            if counts[2] and counts[4]:
                break
            await asyncio.sleep(0.1)
        metrics = await client.metrics()
        assert metrics['codedinvnet_worker_restarts_total{reason="died"}'] >= 1
        assert metrics['codedinvnet_worker_restarts_total{reason="hung"}'] >= 1
        assert metrics['codedinvnet_queries_total{outcome="decoded"}'] >= 5
        assert metrics["codedinvnet_pending_queries"] == 0
        assert survivors([pids[2], pids[4]]) == []
        again = await worker_pids(client)
        assert {again[2], again[4]}.isdisjoint(pids)

        # The front end itself is killed: nothing is left, stopped or not.
        below = descendants(process.pid)
        assert set(again) < set(below)
        os.kill(again[0], signal.SIGSTOP)
        os.kill(process.pid, signal.SIGKILL)
        assert await asyncio.to_thread(process.process.wait) == -signal.SIGKILL
        assert await asyncio.to_thread(survivors, below) == []


@needs_proc
async def test_sigterm_drains(tmp_path: Path, images: np.ndarray) -> None:
    options = ("--k", "4", "--workers", "6", "--policy", "coded", *PATIENT)
    async with (
        server(
            "mnist", *options, "--set", "hang-timeout-ms=25000", log=tmp_path / "log"
        ) as process,
        connect(process.address, "mnist", images) as client,
    ):
        below, pids = descendants(process.pid), await worker_pids(client)
        assert set(pids) < set(below)
        for pid in pids:
            os.kill(pid, signal.SIGSTOP)  # so that nothing is answered before it is asked for
        requests = [
            asyncio.create_task(client.infer(f"request {i}", range(4 * i, 4 * i + 4)))
            for i in range(2)
        ]
        for _ in range(200):
            if (await client.metrics())["codedinvnet_pending_queries"] == 8:
                break
            await asyncio.sleep(0.05)
        assert not any(request.done() for request in requests)
        for _ in range(2):  # timeout(1) sends two
            process.process.send_signal(signal.SIGTERM)
            await asyncio.sleep(0.2)
        address = urlsplit(process.address)

        async def is_refused() -> bool:
            try:
                _, writer = await asyncio.open_connection(address.hostname, address.port)
            except ConnectionRefusedError:
                return True
            writer.close()
            return False

        for _ in range(200):
            if await is_refused():
                break
            await asyncio.sleep(0.05)
        assert await is_refused()
        assert not any(request.done() for request in requests)
        for pid in pids:
            os.kill(pid, signal.SIGCONT)
        replies = await asyncio.gather(*requests)
        assert [reply.error for reply in replies] == ["", ""]
        assert await asyncio.to_thread(process.process.wait, 30) == 0
        assert await asyncio.to_thread(survivors, below) == []
        assert not any(alive(pid) for pid in below)
    events = [json.loads(line) for line in (tmp_path / "log").read_text().splitlines()]
    warned, *others = [event["event"] for event in events]
    assert warned == "wrong workers are not noticed"  # a code with one parity can't tell
    assert others == ["ready", "draining", "stopped"]
    assert events[2]["pending"] > 0  # at the signal, not when all is over


def test_it_is_alive_before_it_is_ready(tmp_path: Path) -> None:
    port = free_port()

    def status(path: str) -> int:
        try:
            with urlopen(f"http://127.0.0.1:{port}/v2/health/{path}", timeout=10) as reply:
                return int(reply.status)
        except HTTPError as error:
            return error.code
        except URLError:
            return 0

    with (tmp_path / "log").open("w") as log:
        command = [sys.executable, "-m", "codedinvnet", "serve", "mnist", "--port", str(port)]
        process = subprocess.Popen(command, stdout=log, stderr=log)
    with ended(process):
        assert wait_until(lambda: status("live") == 200, 60)
        assert status("ready") == 503  # its workers take seconds
        assert "serving mnist" not in (tmp_path / "log").read_text()
        assert wait_until(lambda: status("ready") == 200, 60)
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0


@needs_proc
@pytest.mark.nightly(reason="serving/test_app.py stops one before its workers start")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])  # of one, Python raises
def test_a_stop_while_it_starts(number: signal.Signals, tmp_path: Path) -> None:
    """As a terminal's Ctrl-C or a service manager's stop: to the whole process group."""
    with (tmp_path / "log").open("w") as log, interruptible():
        process = subprocess.Popen(
            [sys.executable, "-m", "codedinvnet", "serve", "mnist", "--port", "0"],
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
        try:
            assert wait_until(lambda: len(descendants(process.pid)) >= 2, 60)
            below = descendants(process.pid)
            os.killpg(process.pid, number)
            assert process.wait(60) == 0
        finally:
            process.kill()
            process.wait()
    assert survivors(below) == []
    text = (tmp_path / "log").read_text()
    assert "serving mnist" not in text  # it was not up yet
    assert "Traceback" not in text


class TestRefused:
    """What cannot work is one line and exit code 2."""

    def refused(self, call: Command, *words: str) -> str:
        outcome = call("serve", *words)
        assert outcome.code == 2
        assert outcome.out == ""
        lines = [line for line in outcome.err.splitlines() if not line.startswith("{")]
        assert len(lines) == 1, outcome.err
        assert lines[0].startswith("error: ")
        return lines[0]

    @pytest.mark.parametrize(
        ("words", "message"),
        [
            (["nothing"], "'nothing'"),
            (["mnist", "--k", "4", "--workers", "4"], "--workers: 4 are too few"),
            (["mnist", "--method", "magic"], "--method: 'magic'"),
            (["mnist", "--pool", "magic"], "--pool: 'magic'"),
            (["mnist", "--device", "cuda:99"], "--device: this machine has no cuda:99"),
            (["mnist", "--host", "192.0.2.1"], "cannot listen on 192.0.2.1"),
            (["mnist", "--token-file", "/nowhere/token"], "read /nowhere/token: No such file"),
            (["mnist", "--faults", "/nowhere/faults"], "cannot read the faults file"),
            (["mnist", "--k", "4", "--faults", "FAULTS"], "the faults name worker 9; there are 5"),
        ],
        ids=lambda value: " ".join(value) if isinstance(value, list) else "",
    )
    def test_options(self, words: list[str], message: str, call: Command, tmp_path: Path) -> None:
        faults = write_faults(tmp_path, slow(1, worker=9))
        words = [faults if word == "FAULTS" else word for word in words]
        assert message in self.refused(call, *words, "--port", "0")
