from __future__ import annotations

from pathlib import Path

import pytest

from codedinvnet.data import load_images
from codedinvnet.data.finding import cache_dir
from codedinvnet.errors import UserError
from tests.data.files import GREY, LABELS, write_npz


@pytest.mark.parametrize(
    ("own", "base", "expected"),
    [("/a", "/b", "/a"), ("", "/b", "/b/codedinvnet"), ("", "", "/home/u/.cache/codedinvnet")],
)
def test_cache_folder(monkeypatch: pytest.MonkeyPatch, own: str, base: str, expected: str) -> None:
    monkeypatch.setenv("CODEDINVNET_CACHE", own)
    monkeypatch.setenv("XDG_CACHE_HOME", base)
    monkeypatch.setattr(Path, "home", lambda: Path("/home/u"))
    assert cache_dir() == Path(expected)


@pytest.mark.parametrize("state", ["does not exist", "is empty", "is not a folder"])
def test_no_data_dir(tmp_path: Path, state: str) -> None:
    root = tmp_path / "there"
    if state == "is empty":
        root.mkdir()
    elif state == "is not a folder":
        root.write_text("")
    with pytest.raises(UserError, match=state) as caught:
        load_images("cifar10", "test", data_dir=root)
    message = str(caught.value)
    assert str(root / "cifar10" / "test.npz") in message
    assert str(root / "cifar-10-batches-py") in message
    assert "test or val" in message
    assert "leave --data-dir out" in message
    assert "\n" not in message


def test_other_split_only(tmp_path: Path) -> None:
    write_npz(tmp_path, "mnist", "train", images=GREY, labels=LABELS)
    with pytest.raises(UserError, match="holds no test images of 'mnist'; looked for"):
        load_images("mnist", "test", data_dir=tmp_path)
