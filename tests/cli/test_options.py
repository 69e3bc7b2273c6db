from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from codedinvnet.cli.command_line import build_parser
from codedinvnet.cli.options import settings_of
from codedinvnet.serving.gateway.options import GatewayOptions
from tests.conftest import Command

KINDS: dict[str, Any] = {"gateway": GatewayOptions}
GATEWAY = {
    "name": "resnet",
    "upstream": ["http://a:8000", "grpc://b:8001"],
    "slots": 2,
    "deadline-ms": 100,
    "cancel": True,
    "upstreams-file": "others",
}


def settings(command: str, *words: str) -> Any:
    return settings_of(build_parser().parse_args([command, *words]), KINDS[command])


def config(folder: Path, found: Any) -> str:
    path = folder / "config.json"
    path.write_text(found if isinstance(found, str) else json.dumps(found))
    return str(path)


@pytest.mark.parametrize("command", KINDS)
def test_every_setting_is_an_option(command: str) -> None:
    known = build_parser().parse_args([command]).known
    fields = {field.name for field in dataclasses.fields(KINDS[command])}
    assert {action.dest for action in known.values()} == fields


def test_a_file_says_what_the_command_line_does_not(tmp_path: Path) -> None:
    path = config(tmp_path, GATEWAY)
    assert settings("gateway", "--config", path) == GatewayOptions(
        "resnet",
        ("http://a:8000", "grpc://b:8001"),
        Path("others"),
        slots=2,
        deadline_ms=100.0,
        cancel=True,
    )
    # An option that is given as it is by default is given all the same.
    words = ("other", "--config", path, "--slots", "4", "--upstream", "http://c:8000")
    found = settings("gateway", *words)
    assert (found.name, found.slots, found.upstream) == ("other", 4, ("http://c:8000",))
    assert found.deadline_ms == 100


def test_without_a_file_there_are_the_defaults() -> None:
    assert settings("gateway", "m") == GatewayOptions("m")


@pytest.mark.parametrize(
    ("found", "told"),
    [
        ({"slot": 4}, "'slot'"),
        ({"deadline_ms": 4}, "'deadline-ms'"),
        ({"config": "other.json"}, "'config'"),
        ({"slots": "4"}, "slots"),
        ({"slots": 1.5}, "slots"),
        ({"slots": True}, "slots"),
        ({"slots": None}, "slots"),
        ({"deadline-ms": "4"}, "deadline-ms"),
        ({"deadline-ms": 10**400}, "deadline-ms"),
        ({"cancel": 1}, "cancel"),
        ({"host": 1}, "host"),
        ({"token-file": ["a"]}, "token-file"),
        ({"upstream": "http://a:8000"}, "upstream"),
        ({"upstream": [1]}, "upstream"),
        ('{"slots": 1, "slots": 2}', "twice"),
        ("[]", "object"),
        ("{", "JSON"),
        (b"\xff".decode("latin-1"), "JSON"),
    ],
)
def test_mistakes_in_a_file_are_one_line(
    found: Any, told: str, tmp_path: Path, call: Command
) -> None:
    path = config(tmp_path, found)
    outcome = call("gateway", "m", "--config", path)
    assert outcome.code == 2
    (line,) = outcome.err.splitlines()
    assert line.startswith("error: --config: ")
    assert path in line
    assert told in line


def test_what_is_needed_and_a_file_that_is_not_there(tmp_path: Path, call: Command) -> None:
    for words in (["gateway"], ["serve", "--k", "2"], ["gateway", "m", "--config", str(tmp_path)]):
        outcome = call(*words)
        assert outcome.code == 2
        assert len(outcome.err.splitlines()) == 1
