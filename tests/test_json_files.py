from __future__ import annotations

from pathlib import Path

import pytest

from codedinvnet.errors import UserError
from codedinvnet.json_files import parse_json, read_json


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
