"""Users' own files: loaded anew each time, each under its own name, and gone if they fail."""

from __future__ import annotations

import pickle
import sys
from pathlib import Path

import pytest

from codedinvnet.common.user_code import load_file, user_module


def test_files_of_one_name_do_not_replace_each_other(tmp_path: Path) -> None:
    for word in ("one", "other"):
        (tmp_path / word).mkdir()
        (tmp_path / word / "mine.py").write_text(f"WORD = {word!r}\nclass Mine: ...\n")
    modules = [user_module(str(tmp_path / word / "mine.py")) for word in ("one", "other")]
    assert [module.WORD for module in modules] == ["one", "other"]
    assert [sys.modules[module.Mine.__module__] for module in modules] == modules


def test_a_file_that_fails_leaves_nothing_behind(tmp_path: Path) -> None:
    before = set(sys.modules)
    path = tmp_path / "mine.py"
    path.write_text("1 / 0")
    with pytest.raises(ZeroDivisionError):
        load_file(path)
    assert set(sys.modules) == before


def test_ray_takes_classes_of_a_file_to_machines_without_it(tmp_path: Path) -> None:
    """As the actors of a user's own pool."""
    cloudpickle = pytest.importorskip("ray.cloudpickle")
    path = tmp_path / "mine.py"
    path.write_text("import ray\nclass Mine:\n    def word(self):\n        return 'mine'\n")
    module = load_file(path)
    sent = cloudpickle.dumps(module.Mine)
    del sys.modules[module.__name__]
    assert pickle.loads(sent)().word() == "mine"
