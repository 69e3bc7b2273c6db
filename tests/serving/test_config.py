"""The options of `serve`: the command line, `--set` and `--config` say the same things."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from codedinvnet.cli.command_line import build_parser
from codedinvnet.cli.options import from_text, options_of
from codedinvnet.common.errors import UserError
from codedinvnet.serving.config import ServeOptions


def parsed(*words: str) -> ServeOptions:
    return options_of(build_parser().parse_args(["serve", *words]), ServeOptions)


def config(folder: Path, found: Any) -> str:
    path = folder / "config.json"
    path.write_text(found if isinstance(found, str) else json.dumps(found))
    return str(path)


def test_flags_a_file_and_set_say_the_same(tmp_path: Path) -> None:
    given = {"k": 4, "deadline-ms": 100, "demo": True, "token-file": "t", "input": ["a", "b"]}
    rare = {"group-timeout-ms": 5.5, "allow-host": ["x", "y"], "on-corruption": "replace"}
    by_file = parsed("mnist", "--config", config(tmp_path, {**given, **rare}))
    words = ["--k", "4", "--deadline-ms", "100", "--demo", "--token-file", "t"]
    words += ["--input", "a", "--input", "b", "--set", "group-timeout-ms=5.5"]
    words += ["--set", "allow_host=x,y", "--set", "on-corruption=replace"]
    assert parsed("mnist", *words) == by_file
    assert by_file.token_file == Path("t")
    assert by_file.inputs == ("a", "b")
    assert (by_file.source, by_file.deadline_ms, by_file.allow_host) == ("mnist", 100, ("x", "y"))
    text = {**{name: str(value) for name, value in given.items()}, "input": "a,b"}
    text |= {"source": "mnist", "demo": "true", "on-corruption": "replace", "allow-host": "x,y"}
    assert from_text(ServeOptions, {**text, "group_timeout_ms": "5.5"}) == by_file


def test_the_command_line_comes_before_the_file(tmp_path: Path) -> None:
    path = config(tmp_path, {"source": "mnist", "k": 4, "max-batch": 3})
    found = parsed("--config", path, "--k", "5", "--set", "max-batch=7")
    assert (found.source, found.k, found.max_batch) == ("mnist", 5, 7)
    assert parsed("--config", path).max_batch == 3
    assert parsed("mnist") == ServeOptions(source="mnist")


BAD: list[tuple[list[str], str]] = [
    ([], "SOURCE: is needed, on the command line or in --config FILE"),
    (["m", "--k", "0"], "--k: must be greater than or equal to 1, got 0"),
    (["m", "--k", "1000000000"], "--k: must be less than or equal to 100"),
    (["m", "--max-disagreement", "1"], "--max-disagreement: must be less than 1"),
    (["m", "--set", "name"], "--set: must be NAME=VALUE, got 'name'"),
    (["m", "--set", "nam=x"], "--set: 'nam' is no option, did you mean 'name'?"),
    (["m", "--set", "on-corruption=stop"], "--set on-corruption: must be 'report' or"),
    (["m", "--set", "extra=inf"], "--set extra: must be a finite number"),
]
BAD_FILES: list[tuple[Any, str]] = [
    ("{", "is not JSON"),
    ([], "must be a JSON object of options"),
    ({"kk": 4}, "'kk' is no option"),
    ({"k": "4"}, 'k: must be a valid integer, got "4"'),
]


@pytest.mark.parametrize(("words", "message"), BAD)
def test_wrong_options(words: list[str], message: str) -> None:
    with pytest.raises(UserError) as caught:
        parsed(*words)
    assert str(caught.value).startswith(message)


@pytest.mark.parametrize(("found", "message"), BAD_FILES)
def test_wrong_files(found: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError) as caught:
        parsed("m", "--config", config(tmp_path, found))
    assert "--config: " in str(caught.value)
    assert message in str(caught.value)
