"""The example of a Ray Serve ingress, without Ray Serve, which nightly tests run it under."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from starlette.requests import Request

from codedinvnet.common.errors import UserError
from codedinvnet.serving.config import ServeOptions


@pytest.fixture(scope="module", autouse=True)
def _installed() -> None:
    pytest.importorskip("ray.serve", reason="ray[serve] is not installed")


@pytest.mark.parametrize(
    ("option", "value", "told"),
    [
        ("token_fiel", "secret", r"token-fiel.* did you mean .*token-file"),
        ("k", "many", r"k: .* got many"),
        *((option, "1", f"{option}: Ray Serve listens") for option in ("host", "port")),
        *((option, "8001", f"{option}: ") for option in ("grpc_port", "traces")),
        ("demo", "true", "demo: needs token_file"),
        ("token_file", "/nowhere/token", "--token-file: cannot read"),
    ],
)
def test_options_that_the_example_could_not_heed(option: str, value: str, told: str) -> None:
    """Refused, or looked at, before Ray is asked for anything."""
    from examples.ray_serve import app

    with pytest.raises(UserError, match=told):
        app({option: value})


def test_the_example_serves_a_protection() -> None:
    """Which has a k of its own."""
    from ray import serve

    from examples.ray_serve import app

    assert isinstance(app({"source": "m.onnx", "protection": "folder"}), serve.Application)


def request(path: str, body: bytes = b"", **fields: str) -> Request:
    """Return a request as Ray Serve hands it on."""
    pairs = [(name.replace("_", "-").encode(), v.encode()) for name, v in fields.items()]
    given = {"type": "http", "method": "POST" if body else "GET", "path": path}
    about = {"query_string": b"", "headers": [(b"host", b"a.example"), *pairs]}

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": body, "more_body": False}

    return Request({**given, **about}, receive)


@pytest.fixture
def options(monkeypatch: pytest.MonkeyPatch) -> Callable[..., ServeOptions]:
    """Return what makes the options that the replica gets, without Ray."""
    from ray import serve

    found: list[ServeOptions] = []

    class Bound:
        def bind(self, options: ServeOptions) -> None:
            found.append(options)

    def made(**arguments: str) -> ServeOptions:
        from examples import ray_serve

        pool = "examples/my_pool.py:Pool"
        ray_serve.app({"pool": pool, "k": "2", "allow_host": "a.example", **arguments})
        return found[-1]

    monkeypatch.setattr(serve, "deployment", lambda **_: lambda _: Bound())
    return made


@pytest.mark.parametrize("guarded", [False, True])
async def test_strangers_do_not_change_the_policy(
    guarded: bool,
    options: Callable[..., ServeOptions],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """The replica does not know on which addresses Ray Serve listens."""
    from examples import ray_serve

    called: list[str] = []
    for name in ("log_to_stderr", "freeze_loaded"):  # without its handler, events lose their fields
        monkeypatch.setattr(ray_serve, name, lambda *_, name=name: called.append(name))
    fields, more = {"content_type": "application/json"}, {}
    if guarded:
        file = tmp_path / "token"
        file.write_text("secret")
        file.chmod(0o600)
        fields["authorization"], more["token_file"] = "Bearer secret", str(file)
    chosen = options(**more)
    assert called == []  # here is not where it runs
    ingress = ray_serve.Ingress.__new__(ray_serve.Ingress)
    await ingress.__init__(chosen)  # type: ignore[misc]
    try:
        assert called == ["log_to_stderr", "freeze_loaded"]
        assert ("no token" in caplog.messages) == (not guarded)
        reply = await ingress(request("/policy", b'{"policy": "uncoded"}', **fields))
        assert reply.status_code == (200 if guarded else 403)
        assert (await ingress(request("/v2/health/ready"))).status_code == 200
        large = await ingress(request("/policy", bytes(5000), **fields))
        assert large.status_code == 413
        assert (
            await ingress(request("/v2/models/mnist/infer", b"{}", **fields))
        ).status_code == 400
        metrics = (await ingress(request("/metrics", b"", **fields))).body
        assert b'codedinvnet_requests_total{code="400"} 1.0' in bytes(metrics)
        assert ingress.api.memory.used == 0
    finally:
        await ingress.dispatcher.stop()
