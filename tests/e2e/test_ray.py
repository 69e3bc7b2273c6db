"""Workers as Ray actors on three nodes, all on this machine; an actor dies, then a node."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks.processes import descendants
from codedinvnet.common.errors import UserError
from codedinvnet.data import sample_images
from codedinvnet.models import open_model
from codedinvnet.net.listening import free_port
from codedinvnet.serving.workers.computing import BundleSpec, ModelSpec
from codedinvnet.serving.workers.pool import Task
from codedinvnet.serving.workers.ray import RayPool
from tests.client import Client, connect
from tests.models.factories import PLACE, TOKENS, WORDS
from tests.processes import needs_proc, server, slow, survivors, write_faults

pytestmark = pytest.mark.skipif(
    find_spec("ray") is None, reason="the extra codedinvnet[ray] is not installed"
)

NODE = {
    "num_cpus": 1,
    "object_store_memory": 80 * 1024 * 1024,
    "include_dashboard": False,
    "node_ip_address": "127.0.0.2",  # Ray turns 127.0.0.1 into an address of the network
}


@contextmanager
def nodes(count: int) -> Iterator[Any]:
    """Nodes that only this machine reaches; nothing of them may be left in the end."""
    with pytest.MonkeyPatch.context() as changed:
        changed.setenv("RAY_AUTH_MODE", "disabled")
        changed.setenv("RAY_enable_metrics_collection", "0")
        changed.setenv("RAY_USAGE_STATS_ENABLED", "0")
        from ray.cluster_utils import Cluster

        before = set(descendants(os.getpid())) if sys.platform == "linux" else set()
        found = Cluster(initialize_head=True, head_node_args=NODE)
        try:
            for _ in range(count - 1):
                found.add_node(**NODE, wait=False)
            found.wait_for_nodes()
            yield found
        finally:
            below = set(descendants(os.getpid())) - before
            found.shutdown()  # type: ignore[no-untyped-call]
            assert survivors(below, 20) == []


def raylet(node: Any) -> int:
    """Return the process of a node that its actors are children of."""
    pid: int = node.all_processes["raylet"][0].process.pid
    return pid


def test_a_dead_address_is_told_at_once() -> None:
    address = f"127.0.0.1:{free_port()}"
    pool = RayPool(BundleSpec("mnist", 4), address)
    began = time.monotonic()
    with pytest.raises(UserError, match=f"cannot connect to Ray at {address}"):
        asyncio.run(pool.start(1))
    assert time.monotonic() - began < 30


async def test_actors_run_a_model_of_ones_own() -> None:
    model = open_model(f"{PLACE}:words")
    tokens = {"tokens": np.random.default_rng(0).integers(0, WORDS, (1, TOKENS), np.int32)}

    with nodes(1) as cluster:
        pool = RayPool(ModelSpec(model.source), cluster.address)
        await pool.start(1)
        try:
            found = (await pool.call(0, Task(1, 0, tokens))).outputs["logits"]
        finally:
            await pool.stop()
    assert found.tobytes() == model.run(tokens)["logits"].tobytes()
    assert found.flags.writeable


@pytest.fixture
def cluster() -> Iterator[Any]:
    """Three nodes, of which a test may kill some."""
    with nodes(3) as found:
        yield found


@needs_proc
@pytest.mark.nightly(reason="new actors take half a minute to start")
async def test_an_actor_and_a_node_are_lost(cluster: Any, tmp_path: Path) -> None:
    samples = sample_images("mnist")
    images, labels = samples.images.numpy(), samples.labels.numpy()
    options = f"--k 3 --workers 4 --pool ray --set ray-address={cluster.address}".split()
    times = ("--set", "group-timeout-ms=500", "--deadline-ms", "30000", "--policy", "coded")
    faults = write_faults(tmp_path, slow(500, probability=0.1))

    async def workers(client: Client) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = (await client.get("page/state"))["workers"]
        return found

    async with (
        server("mnist", *options, *times, "--faults", faults, log=tmp_path / "log") as process,
        connect(process.address, "mnist", images) as client,
    ):
        pids = [worker["pid"] for worker in await workers(client)]
        assert len(set(pids)) == 4
        homes = {node: set(descendants(raylet(node))) & set(pids) for node in cluster.worker_nodes}
        lost, here = max(homes.items(), key=lambda item: len(item[1]))
        assert here, "no actor on a node that can be removed"
        victim = next(pid for pid in pids if pid not in here)
        print(f"{[len(h) for h in homes.values()]} of 4 actors are not on the first node")

        async def hurt() -> None:
            await asyncio.sleep(1)
            os.kill(victim, signal.SIGKILL)
            await asyncio.sleep(2)
            await asyncio.to_thread(cluster.remove_node, lost, allow_graceful=False)

        hurting = asyncio.create_task(hurt())
        replies = await client.load([[i] for i in range(100)], rate=20, seed=0, label="query")
        await hurting
        assert [reply.error for reply in replies] == [""] * len(replies)
        assert all(reply.returned == reply.identity for reply in replies)
        right = [reply.labels[0] == labels[reply.rows[0]] for reply in replies]
        decoded = sum(reply.outcomes[0] != "direct" for reply in replies)
        slowest = max(reply.latency for reply in replies)
        print(f"{sum(right)} of {len(right)} right, {decoded} decoded, {slowest:.2f} s at most")
        assert np.mean(right) >= 0.9
        assert decoded >= 1

        gone = [i for i, pid in enumerate(pids) if pid == victim or pid in here]
        for _ in range(1200):  # a new actor takes half a minute where others compute, too
            found = await workers(client)
            if all(found[i]["restarts"] and found[i]["state"] == "up" for i in gone):
                break
            await asyncio.sleep(0.1)
        assert [found[i]["state"] for i in gone] == ["up"] * len(gone)
        assert {found[i]["pid"] for i in gone}.isdisjoint(pids)
        print(f"restarts: {[worker['restarts'] for worker in found]}")
        assert all(worker["restarts"] <= 2 for worker in found)
        reply = await client.infer("last", range(20))
        assert reply.ok

        for _ in range(2):  # as timeout(1) does
            process.process.send_signal(signal.SIGTERM)
        assert await asyncio.to_thread(process.process.wait, 30) == 0
        actors = [worker["pid"] for worker in found]
        assert await asyncio.to_thread(survivors, actors, 20) == []
        assert "SIGTERM received" not in (tmp_path / "log").read_text()  # Ray's trace
