from __future__ import annotations

import pytest

from codedinvnet.cli.common import guarded


@pytest.mark.parametrize(
    ("said", "told"), [("Unable to allocate 7 TiB", ": Unable to allocate 7 TiB"), ("", "")]
)
def test_too_little_memory_is_one_line(
    said: str, told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    def fills_up() -> None:
        raise MemoryError(said)

    assert guarded(fills_up) == 2
    assert capsys.readouterr().err == f"error: too little memory{told}\n"
