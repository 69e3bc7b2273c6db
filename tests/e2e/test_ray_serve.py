"""The example of a Ray Serve ingress, without Ray Serve, which nightly tests run it under."""

from __future__ import annotations

import pytest

from codedinvnet.common.errors import UserError


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
