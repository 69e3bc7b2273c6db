"""Pools of users' own: what is wrong with one is reported."""

from __future__ import annotations

from pathlib import Path

import pytest

from codedinvnet.common.errors import UserError
from codedinvnet.serving.app import open_app
from codedinvnet.serving.config import ServeOptions
from codedinvnet.serving.opened import check
from tests.models.factories import PLACE


def written(folder: Path, text: str) -> str:
    path = folder / "mine.py"
    path.write_text(text, encoding="utf-8")
    return f"{path}:Mine"


def options(pool: str) -> ServeOptions:
    return ServeOptions(source=f"{PLACE}:mlp", workers=2, policy="uncoded", pool=pool)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "--pool: {place} has no class Mine"),
        (
            "class Mine:\n    start = stop = print",
            "--pool: Mine of {place} lacks call, replace, pid",
        ),
    ],
)
def test_a_class_that_is_no_pool(text: str, message: str, tmp_path: Path) -> None:
    place = written(tmp_path, text)
    with pytest.raises(UserError) as caught:
        open_app(options(place))
    assert str(caught.value) == message.format(place=place.rpartition(":")[0])


def test_a_pool_that_is_nowhere(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"--pool: 'slurm' is not local, ray or FILE.py:CLASS"):
        check(options("slurm"))
    with pytest.raises(UserError, match=r"--pool: there is no file .*nowhere\.py"):
        open_app(options(f"{tmp_path}/nowhere.py:Mine"))
    for module in ("no_such_module:Mine", ":Mine"):
        with pytest.raises(UserError, match=f"--pool {module}: "):
            open_app(options(module))
