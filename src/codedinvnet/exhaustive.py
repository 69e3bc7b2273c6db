"""The end of a list of cases that names them all; `typing` has it from Python 3.11 on."""

from __future__ import annotations

from typing import NoReturn


def assert_never(value: NoReturn) -> NoReturn:
    """End a list of cases: mypy refuses the call while a case is left that the list lacks.

    Raises:
        AssertionError: if it is reached all the same.
    """
    raise AssertionError(f"nobody handles {value!r}")
