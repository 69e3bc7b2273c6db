from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from torch import nn

from codedinvnet.common.errors import UserError
from codedinvnet.models import checkpoint
from codedinvnet.models.checkpoint import (
    load_checkpoint,
    load_modules,
    module_tensors,
    save_checkpoint,
)

TENSORS = {
    "a": torch.arange(12, dtype=torch.float32).reshape(3, 4),
    "b": torch.tensor([7, 8], dtype=torch.int64),
    "scalar": torch.tensor(2.5, dtype=torch.float64),
}
HEADER = {"epoch": 3, "settings": {"name": "mnist", "list": [1, 2]}, "text": "µ"}
CHECK = settings(
    deadline=None, max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


def whole(tmp_path: Path) -> bytes:
    path = tmp_path / "whole.safetensors"
    save_checkpoint(path, TENSORS, HEADER)
    return path.read_bytes()


def refusal(path: Path) -> str:
    with pytest.raises(UserError) as caught:
        load_checkpoint(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_round_trip(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "er" / "x.safetensors"
    shared = TENSORS["a"].t()  # not contiguous, and sharing memory with another
    save_checkpoint(path, {**TENSORS, "view": shared}, HEADER)
    tensors, header = load_checkpoint(path)
    assert header == {"format_version": checkpoint.FORMAT_VERSION, **HEADER}
    assert tensors.keys() == {*TENSORS, "view"}
    for key, value in {**TENSORS, "view": shared}.items():
        assert tensors[key].dtype == value.dtype
        assert torch.equal(tensors[key], value)
    assert [p.name for p in path.parent.iterdir()] == ["x.safetensors"]


@CHECK
@given(share=st.floats(min_value=0, max_value=1, exclude_max=True))
@example(share=0.0)
@example(share=0.999999)
def test_cut_file_is_refused(share: float, tmp_path: Path) -> None:
    content = whole(tmp_path)
    path = tmp_path / "cut.safetensors"
    path.write_bytes(content[: int(len(content) * share)])
    refusal(path)


@pytest.mark.parametrize("new_format", [True, False])
def test_pickle_is_refused_unread(new_format: bool, tmp_path: Path) -> None:
    marker = tmp_path / "ran"

    class Trap:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return os.mkdir, (str(marker),)

    path = tmp_path / "model.pth"
    torch.save({"trap": Trap()}, path, _use_new_zipfile_serialization=new_format)
    assert "pickle" in refusal(path)
    assert not marker.exists()


def test_missing_file_and_folder(tmp_path: Path) -> None:
    assert "no checkpoint" in refusal(tmp_path / "none.safetensors")
    assert "no checkpoint" in refusal(tmp_path)


@pytest.mark.parametrize("version", [0, 2, "1", None])
def test_other_format_version(version: object, tmp_path: Path) -> None:
    path = tmp_path / "new.safetensors"
    save_checkpoint(path, TENSORS, {"format_version": version})
    assert f"format version {version}" in refusal(path)


def no_replace(source: object, target: object) -> NoReturn:
    raise OSError(28, "No space left on device")


def no_sync(handle: int) -> NoReturn:
    raise KeyboardInterrupt


@pytest.mark.parametrize(
    ("function", "failure", "error"),
    [("replace", no_replace, OSError), ("fsync", no_sync, KeyboardInterrupt)],
)
def test_crash_while_writing_leaves_the_old_file(
    function: str,
    failure: Callable[..., NoReturn],
    error: type[BaseException],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    path = tmp_path / "x.safetensors"
    save_checkpoint(path, TENSORS, HEADER)
    before = path.read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr(os, function, failure)
        with pytest.raises(error, match=r"^$|No space left on device: .*x\.safetensors'$"):
            save_checkpoint(path, {"a": torch.zeros(2)}, {})
        with pytest.raises(error):
            save_checkpoint(tmp_path / "new.safetensors", {"a": torch.zeros(2)}, {})
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["x.safetensors"]


def net(hidden: int = 4, extra: bool = False) -> nn.Module:
    layers: list[nn.Module] = [nn.Linear(3, hidden), nn.Tanh(), nn.Linear(hidden, 2)]
    return nn.Sequential(*layers, *([nn.Linear(2, 2)] if extra else []))


@pytest.mark.parametrize(
    ("stored", "wanted", "said"),
    [
        (net(5), net(4), r"size mismatch for two\.0\.weight: .*\[5, 3\].*\[4, 3\]"),
        (net(4, extra=True), net(4), r"Unexpected key\(s\).*two\.3\.bias"),
        (net(4), net(4, extra=True), r"Missing key\(s\).*two\.3\.bias"),
    ],
)
def test_another_architecture_is_refused(stored: nn.Module, wanted: nn.Module, said: str) -> None:
    tensors = module_tensors({"one": net(), "two": stored})
    told = f"^file.safetensors holds another architecture: {said}"
    with pytest.raises(UserError, match=told) as caught:
        load_modules({"one": net(), "two": wanted}, tensors, Path("file.safetensors"))
    assert "\n" not in str(caught.value)
