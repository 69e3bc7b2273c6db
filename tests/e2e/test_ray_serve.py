"""The example of a Ray Serve ingress, but for its answers: those are asked for at night."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from codedinvnet.errors import UserError

pytest.importorskip("ray.serve", reason="ray[serve] is not installed")


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
