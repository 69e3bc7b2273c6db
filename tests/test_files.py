from __future__ import annotations

import os
from pathlib import Path
from typing import NoReturn

import pytest
from matplotlib.figure import Figure

from codedinvnet.errors import UserError
from codedinvnet.files import (
    check_folder,
    check_writable,
    parse_json,
    read_json,
    write_atomically,
    write_picture,
)


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
    for path, reason in ((tmp_path, "it is a folder"), (file / "file", "file is no folder")):
        with pytest.raises(UserError, match=f"cannot write to {path}: .*{reason}"):
            check_writable(path)
    monkeypatch.setattr(os, "access", lambda path, mode: (path, mode) != (tmp_path, os.W_OK))
    with pytest.raises(UserError, match=f"nothing may be written into {tmp_path}"):
        check_writable(tmp_path / "new" / "file")
    monkeypatch.setattr(os, "access", lambda path, mode: path != file)
    with pytest.raises(UserError, match=f"cannot write to {file}: it may not be changed"):
        check_writable(file)


def test_a_folder_is_judged_whatever_it_holds(tmp_path: Path) -> None:
    (tmp_path / "any").mkdir()
    (tmp_path / "file").touch()
    check_folder(tmp_path, "--save-dir")
    with pytest.raises(UserError, match=r"--save-dir: cannot write into .*: .*file is no folder"):
        check_folder(tmp_path / "file", "--save-dir")


@pytest.mark.parametrize("path", [Path("/dev/null"), Path("/")])
def test_devices_and_roots_are_not_written(path: Path) -> None:
    with pytest.raises(UserError, match=f"cannot write to {path}: it is "):
        check_writable(path)


def test_a_link_leads_to_what_is_written(tmp_path: Path) -> None:
    target, link = tmp_path / "there" / "file", tmp_path / "link"
    target.parent.mkdir()
    link.symlink_to(target)
    write_atomically(link, b"new")
    assert link.is_symlink()
    assert target.read_bytes() == b"new"


def test_a_picture_is_whole_or_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "new" / "picture.png"
    write_picture(path, Figure())
    drawn = path.read_bytes()
    assert drawn.startswith(b"\x89PNG")

    def killed(*_: object) -> NoReturn:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        write_picture(path, Figure(figsize=(1, 1)))
    assert path.read_bytes() == drawn
    assert list(path.parent.iterdir()) == [path]


def test_content_is_synced_before_it_takes_the_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[str] = []
    sync, replace = os.fsync, os.replace

    def noted_sync(handle: int) -> None:
        assert os.fstat(handle).st_size == 7
        done.append("fsync")
        sync(handle)

    def noted_replace(source: str, target: Path) -> None:
        done.append("replace")
        replace(source, target)

    monkeypatch.setattr(os, "fsync", noted_sync)
    monkeypatch.setattr(os, "replace", noted_replace)
    write_atomically(tmp_path / "x", b"content")
    assert done[:2] == ["fsync", "replace"]
    assert (tmp_path / "x").read_bytes() == b"content"


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664)])
def test_the_umask_says_who_may_read(umask: int, mode: int, tmp_path: Path) -> None:
    before = os.umask(umask)
    try:
        write_atomically(tmp_path / "x", b"content")
    finally:
        os.umask(before)
    assert (tmp_path / "x").stat().st_mode & 0o777 == mode


def test_what_a_killed_writer_left_is_removed(tmp_path: Path) -> None:
    path = tmp_path / "a[1].json"
    names = (".a[1].json-00000001", ".a[1].json-00000002", ".a[1].json-mine")
    old, new, other = (tmp_path / name for name in names)
    for part in (old, new, other):
        part.write_text("a part")
    for part in (old, other):
        os.utime(part, (0, 0))
    write_atomically(path, b"whole")
    assert path.read_bytes() == b"whole"
    assert sorted(tmp_path.iterdir()) == [new, other, path]
