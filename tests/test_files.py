from __future__ import annotations

import os
from pathlib import Path

import pytest

from codedinvnet.common.errors import UserError
from codedinvnet.common.files import check_writable, parse_json, read_json


def test_a_file_comes_back(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text('{"a": ["é", 1.5, null]}', encoding="utf-8")
    assert read_json(path) == {"a": ["é", 1.5, None]}


@pytest.mark.parametrize(
    "text", [b"", b"{oops", b"\xff\xfe\xfa", b"[" * 100_000, b"9" * 5000], ids=range(5)
)
def test_what_is_no_json_is_told_in_one_line(tmp_path: Path, text: bytes) -> None:
    path = tmp_path / "a.json"
    path.write_bytes(text)
    with pytest.raises(UserError, match=r"^the grid .*a\.json is not JSON: .") as caught:
        read_json(path, "the grid")
    assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match=r"^line 7 is not JSON: "):
        parse_json(text, "line 7")


def test_what_cannot_be_read_is_told(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"^cannot read the grid .*none\.json: No such file"):
        read_json(tmp_path / "none.json", "the grid")
    with pytest.raises(UserError, match=r"^cannot read .*: Is a directory"):
        read_json(tmp_path)


def test_a_place_that_cannot_be_written_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "file"
    file.touch()
    check_writable(file)
    check_writable(tmp_path / "new" / "file")
    assert not (tmp_path / "new").exists()
    for path, reason in ((tmp_path, "no file"), (file / "file", f"{file} is no folder")):
        with pytest.raises(UserError, match=f"cannot write to {path}: .*{reason}"):
            check_writable(path)
    monkeypatch.setattr(os, "access", lambda path, mode: (path, mode) != (tmp_path, os.W_OK))
    with pytest.raises(UserError, match=f"{tmp_path} is no folder that may be changed"):
        check_writable(tmp_path / "new" / "file")
    monkeypatch.setattr(os, "access", lambda path, mode: path != file)
    with pytest.raises(UserError, match=f"{file} is no file that may be changed"):
        check_writable(file)
