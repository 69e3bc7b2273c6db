from __future__ import annotations

import argparse
import shlex
import subprocess
import sys

import pytest

from codedinvnet.cli.command_line import build_parser
from tests.conftest import Command


def commands(parser: argparse.ArgumentParser | None = None) -> dict[str, argparse.ArgumentParser]:
    """Return the commands of a parser, of the whole command line if it is None."""
    actions = (parser or build_parser())._actions
    found = [a for a in actions if isinstance(a, argparse._SubParsersAction)]
    return dict(found[0].choices) if found else {}


def leaves() -> list[str]:
    """Return every command that does something, `benchmarks serve` and the like included."""
    return [
        " ".join([name, *rest])
        for name, parser in commands().items()
        for rest in [[sub] for sub in commands(parser)] or [[]]
    ]


@pytest.mark.parametrize("name", leaves())
def test_help_shows_an_example_that_parses(name: str, call: Command) -> None:
    outcome = call(*name.split(), "--help")
    assert outcome.code == 0
    assert outcome.err == ""
    example = outcome.out.split("example:\n")[1].strip()
    assert example.startswith(f"codedinvnet {name}")
    assert callable(build_parser().parse_args(shlex.split(example)[1:]).run)


def imported(statements: str) -> list[str]:
    """Return the modules that statements import in a process of their own."""
    code = (
        "import sys\n"
        "before = set(sys.modules)\n"
        f"{statements}\n"
        "for module in set(sys.modules) - before: print(module)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return done.stdout.split()


def test_a_service_imports_what_it_needs() -> None:
    """The rest would take as long as PyTorch, in the front end and in the fork server."""
    loaded = imported(
        "from codedinvnet.serving.config import ServeOptions\n"
        "from codedinvnet.serving.app import open_app\n"
        "open_app(ServeOptions(source='mnist', k=4, workers=5))"
    )
    assert "torch" in loaded
    assert not {"torchvision", "scipy", "pandas", "matplotlib", "torch._dynamo"} & set(loaded)


def test_help_needs_no_heavy_imports() -> None:
    loaded = imported("from codedinvnet.cli.command_line import build_parser; build_parser()")
    assert "codedinvnet.cli.commands" in loaded
    assert not {"torch", "numpy", "uvloop"} & set(loaded)


def test_wrong_usage(call: Command) -> None:
    assert call().code == 2
    assert call("evaluate").code == 2
    assert call("fly", "me").code == 2


@pytest.mark.parametrize(
    "words",
    [
        "http://a --token-file F hedge",
        "http://a hedge --token-file F",
        "--token-file F http://a hedge",
    ],
)
def test_a_policy_stands_before_or_behind_options(words: str) -> None:
    found = build_parser().parse_args(["policy", *words.split()])
    assert (found.url, found.policy, str(found.token_file)) == ("http://a", "hedge", "F")


@pytest.mark.parametrize(
    ("words", "command", "meant"),
    [
        ("gateway toy --upsteam http://a", "gateway", "--upstream"),
        ("gateway toy --upsteam=http://a --upsteam=http://b", "gateway", "--upstream"),
        ("gateway --slot 2 --canel toy", "gateway", "--slots, --cancel"),
        ("gateway --hedge-delay 5:50", "gateway", "--hedge-delay-ms"),
        ("bench accuracy --onyl k=2", "bench accuracy", "--only"),
        ("evaluate mnist --zzz 4", "evaluate", ""),
        ("evaluate mnist fashion", "evaluate", ""),
        ("policy http://a hedge --token-file F auto", "policy", ""),
        ("policy http://a hedge auto", "policy", ""),
    ],
)
def test_unknown_words_are_refused_by_the_command_that_got_them(
    words: str, command: str, meant: str, call: Command
) -> None:
    outcome = call(*words.split())
    assert outcome.code == 2
    assert outcome.err.startswith(f"usage: codedinvnet {command} [")
    told = outcome.err.splitlines()[-1]
    assert told.startswith(f"codedinvnet {command}: error: ")
    assert told.partition("did you mean ")[2].rstrip("?") == meant


def test_a_misspelt_command_is_refused_with_the_right_one(call: Command) -> None:
    outcome = call("gatway")
    assert outcome.code == 2
    assert outcome.err.splitlines()[-1].endswith("'gatway' is not known; did you mean 'gateway'?")


@pytest.mark.parametrize("words", ["evaluate mnist", "demo"])
def test_a_seed_that_no_generator_takes_is_wrong_usage(words: str, call: Command) -> None:
    for seed in ("-1", str(2**31), "9" * 23, "1.5"):
        outcome = call(*words.split(), "--seed", seed)
        assert outcome.code == 2
        assert "argument --seed: " in outcome.err.splitlines()[-1]
    largest = build_parser().parse_args([*words.split(), "--seed", str(2**31 - 1)])
    assert largest.seed == 2**31 - 1
