from __future__ import annotations

import asyncio
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from codedinvnet.common.errors import UserError
from codedinvnet.serving.workers import ray as ray_pool
from codedinvnet.serving.workers.computing import BundleSpec
from codedinvnet.serving.workers.pool import WorkerDied
from codedinvnet.serving.workers.ray import Actor, RayPool


class Handle:
    """An actor that gives a sign of life, or none."""

    def __init__(self, alive: bool) -> None:
        self.alive = alive
        self.whereabouts = self

    def options(self, **_: Any) -> Handle:
        return self

    def remote(self) -> asyncio.Future[tuple[str, int]]:
        sign: asyncio.Future[tuple[str, int]] = asyncio.get_running_loop().create_future()
        if self.alive:
            sign.set_result(("here", 1))
        return sign


async def test_an_idle_actor_that_gives_no_sign_of_life_is_given_up_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(ray_pool, "HEARTBEAT", 0.01)
    monkeypatch.setattr(ray_pool, "HEARTBEAT_TIMEOUT", 0.02)
    pool = RayPool.__new__(RayPool)
    pool.actors = [Actor(Handle(False), "here", 7), Actor(Handle(True), "here", 8)]
    given_up: list[tuple[int, str]] = []
    pool.on_death = lambda worker, reason: given_up.append((worker, reason))

    watch = asyncio.create_task(pool._watch())
    await asyncio.sleep(0.3)  # ten heartbeats, and more
    watch.cancel()
    assert given_up == [(0, "no sign of life")]
    assert [actor.dead for actor in pool.actors] == ["no sign of life", ""]


def test_an_actor_that_cannot_start_stops_the_service(monkeypatch: pytest.MonkeyPatch) -> None:
    async def fail(_: RayPool) -> Actor:
        raise RuntimeError("no such node")

    class Initialized:
        def is_initialized(self) -> bool:
            return True

        def remote(self, **_: Any) -> Any:
            return lambda cls: cls

        def shutdown(self) -> None: ...

    monkeypatch.setattr(RayPool, "_spawn", fail)
    pool = RayPool.__new__(RayPool)
    pool.ray, pool.spec = Initialized(), BundleSpec("mnist", 4)
    pool.actors, pool.heartbeats, pool.connected = [], None, False
    with pytest.raises(UserError, match="the Ray actors cannot start: no such node"):
        asyncio.run(pool.start(11))


class NoRay:
    """Stands in for Ray, and connects to nothing."""

    def init(self, **options: Any) -> None:
        assert options["address"] == "local"


@pytest.mark.parametrize("where", ["nowhere", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH", "home"])
def test_a_users_token_is_asked_for(
    where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ray switches its tokens on by itself, unless an option says otherwise."""
    monkeypatch.setattr(os, "environ", {"HOME": str(tmp_path)})
    if where == "home":
        (tmp_path / ".ray").mkdir()
        (tmp_path / ".ray" / "auth_token").write_text("secret")
    elif where != "nowhere":
        os.environ[where] = str(tmp_path / "secret")
    pool = RayPool.__new__(RayPool)
    pool.ray, pool.spec, pool.address = NoRay(), BundleSpec("mnist", 4), None
    pool._connect()
    assert os.environ.get("RAY_AUTH_MODE") == ("disabled" if where == "nowhere" else None)
    os.environ["RAY_AUTH_MODE"] = "token"
    pool._connect()
    assert os.environ["RAY_AUTH_MODE"] == "token"


class Lost:
    """Stands in for Ray whose node is lost; it may be connected again when the cluster is back."""

    class exceptions:
        RayError = RuntimeError

    def __init__(self) -> None:
        self.back, self.alive = False, False
        self.connected: list[str] = []
        self.fate: list[Exception] = []

    def get_runtime_context(self) -> Any:
        return SimpleNamespace(get_node_id=lambda: "here")

    def nodes(self) -> list[dict[str, Any]]:
        return [{"NodeID": "here", "Alive": self.alive}, {"NodeID": "there", "Alive": True}]

    def shutdown(self) -> None:
        self.connected.append("shutdown")

    def init(self, **_: Any) -> None:
        if not self.back:
            raise ConnectionError("no raylet here")
        self.connected.append("init")
        self.alive = True

    def kill(self, *_: Any, **__: Any) -> None: ...

    def remote(self, _: BundleSpec) -> Any:
        return self

    @property
    def whereabouts(self) -> Any:
        return SimpleNamespace(options=lambda **_: SimpleNamespace(remote=self._where))

    def _where(self) -> asyncio.Future[tuple[str, int]]:
        sign: asyncio.Future[tuple[str, int]] = asyncio.get_running_loop().create_future()
        if self.fate:
            sign.set_exception(self.fate.pop())
        else:
            sign.set_result(("here", 1))
        return sign


def lost_pool(ray: Lost) -> RayPool:
    pool = RayPool.__new__(RayPool)
    pool.ray, pool.remote, pool.spec, pool.address = ray, ray, BundleSpec("mnist", 4), "auto"
    pool.connected, pool.connecting, pool.on_death = True, asyncio.Lock(), None
    pool.actors = [Actor(ray, "here", i) for i in range(3)]
    return pool


async def test_a_lost_cluster_is_connected_to_once_when_it_is_back() -> None:
    ray = Lost()
    pool = lost_pool(ray)
    for _ in range(2):
        with pytest.raises(WorkerDied, match="cannot connect to Ray at auto: no raylet here"):
            await pool.replace(0)
    assert all(actor.dead for actor in pool.actors)
    ray.back = True
    ray.connected.clear()
    await asyncio.gather(*[pool.replace(worker) for worker in range(3)])
    assert ray.connected == ["shutdown", "init"]
    assert not any(actor.dead for actor in pool.actors)


async def test_an_actors_user_error_is_the_users() -> None:
    ray = Lost()
    ray.alive = True
    ray.fate = [RuntimeError("ray::RayWorker\ncodedinvnet.common.errors.UserError: no bundle 'x'")]
    pool = lost_pool(ray)
    with pytest.raises(UserError, match=r"^no bundle 'x'"):
        await pool.replace(0)
    await pool.replace(0)


def test_what_ray_says_is_an_event(caplog: pytest.LogCaptureFixture) -> None:
    ray_pool.say(
        {"lines": ["\nRaylet is terminated.\n    [state-dump] a\n"], "pid": "raylet"}, False
    )
    (told,) = [record for record in caplog.records if record.message == "ray"]
    assert vars(told)["fields"] == {"reason": "Raylet is terminated."}
