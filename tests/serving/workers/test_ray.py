"""Whether Ray's tokens are on; lost actors and nodes are those of a real cluster, in e2e."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from codedinvnet.serving.workers import ray as ray_pool
from codedinvnet.serving.workers.computing import BundleSpec
from codedinvnet.serving.workers.ray import RayPool


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
    pool = RayPool(BundleSpec("mnist", 4))
    pool.ray = NoRay()
    pool._connect()
    assert os.environ.get("RAY_AUTH_MODE") == ("disabled" if where == "nowhere" else None)
    os.environ["RAY_AUTH_MODE"] = "token"
    pool._connect()
    assert os.environ["RAY_AUTH_MODE"] == "token"


def test_what_ray_says_is_an_event(caplog: pytest.LogCaptureFixture) -> None:
    lines = ["\nRaylet is terminated.\n    [state-dump] a\n"]
    ray_pool.say({"lines": lines, "pid": "raylet"}, False)
    (told,) = [record for record in caplog.records if record.message == "ray"]
    assert vars(told)["fields"] == {"reason": "Raylet is terminated."}
