"""The example of a Ray Serve ingress, but for its answers: those are asked for at night."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest

from codedinvnet.common.errors import UserError


@pytest.fixture(scope="module", autouse=True)
def _installed() -> None:
    pytest.importorskip("ray.serve", reason="ray[serve] is not installed")


def test_options_that_the_example_could_not_heed(tmp_path: Path) -> None:
    """Refused, or looked at, before Ray is asked for anything."""
    from examples.ray_serve import app

    with pytest.raises(UserError, match=r"token-fiel.* did you mean .*token-file"):
        app({"token_fiel": "secret"})
    with pytest.raises(UserError, match=r"k: input should be a valid integer.* got many"):
        app({"k": "many"})
    for option in ("host", "port"):
        with pytest.raises(UserError, match=f"{option}: Ray Serve listens"):
            app({option: "1"})
    for option, value in (("grpc_port", "8001"), ("traces", "http://collector:4318")):
        with pytest.raises(UserError, match=f"{option}: "):
            app({option: value})
    with pytest.raises(UserError, match="demo: needs token_file"):
        app({"demo": "true"})
    with pytest.raises(UserError, match="--token-file: cannot read"):
        app({"token_file": str(tmp_path / "none")})


def test_the_example_serves_a_protection() -> None:
    """Which has a k of its own."""
    from ray import serve

    from examples.ray_serve import app

    assert isinstance(app({"source": "m.onnx", "protection": "folder"}), serve.Application)


@pytest.fixture
def makers(monkeypatch: pytest.MonkeyPatch) -> list[Callable[[], Any]]:
    """Return what makes the application in the replica of each that is built."""
    from ray import serve

    found: list[Callable[[], Any]] = []

    def ingress(make: Callable[[], Any]) -> Any:
        found.append(make)
        return lambda cls: cls

    monkeypatch.setattr(serve, "ingress", ingress)
    return found


@pytest.mark.parametrize("guarded", [False, True])
async def test_strangers_do_not_change_the_policy(
    guarded: bool,
    makers: list[Callable[[], Any]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """The application does not know on which addresses Ray Serve listens."""
    from examples import ray_serve

    monkeypatch.setattr(ray_serve, "log_to_stderr", lambda *_: None)
    arguments, headers = {"k": "2", "allowed_host": "a.example"}, {}
    if guarded:
        file = tmp_path / "token"
        file.write_text("secret")
        file.chmod(0o600)
        arguments["token_file"], headers = str(file), {"Authorization": "Bearer secret"}
    ray_serve.app(arguments)
    transport = httpx.ASGITransport(makers[0](), client=("192.0.2.1", 1))
    async with httpx.AsyncClient(
        transport=transport, base_url="http://a.example", headers=headers
    ) as client:
        reply = await client.post("/policy", json={"policy": "uncoded"})
    assert reply.status_code == (200 if guarded else 403)
    assert ("no token" in caplog.messages) == (not guarded)


def test_the_examples_events_are_told_as_serve_tells_them(
    makers: list[Callable[[], Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without its handler, events would lose their fields."""
    from examples import ray_serve

    called: list[str] = []
    for name in ("log_to_stderr", "freeze_loaded"):
        monkeypatch.setattr(ray_serve, name, lambda *_, name=name: called.append(name))
    ray_serve.app({"source": "mnist", "k": "2", "allowed_host": "a.example,b.example"})
    assert called == []  # here is not where it runs
    makers[0]()
    assert called == ["log_to_stderr", "freeze_loaded"]
