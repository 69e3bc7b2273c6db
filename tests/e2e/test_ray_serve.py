"""The example of a Ray Serve ingress, without Ray Serve, which nightly tests run it under."""

from __future__ import annotations

from collections.abc import Callable
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
        ("grpc_port", "8001", "grpc_port: "),
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
