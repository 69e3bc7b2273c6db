"""The benchmarks' command line: examples parse, and options are the parameters of a function."""

from __future__ import annotations

import inspect
import shlex
import subprocess
import sys
from importlib import import_module

import pytest

from benchmarks.command_line import build_parser
from tests.cli.test_command_line import commands
from tests.conftest import Command


@pytest.mark.parametrize("name", commands(build_parser()))
def test_help_shows_an_example_whose_options_a_function_takes(
    name: str, call_benchmarks: Command
) -> None:
    outcome = call_benchmarks(name, "--help")
    assert outcome.code == 0
    example = outcome.out.split("example:\n")[1].strip()
    assert example.startswith(f"python -m benchmarks {name} ")
    given = set(vars(build_parser().parse_args(shlex.split(example)[3:])))
    parameters = set(inspect.signature(import_module(f"benchmarks.{name}").run).parameters)
    assert given - {"run", "benchmark", "json"} == parameters


def test_what_is_missing_is_named_with_the_extra_that_brings_it() -> None:
    program = (
        "import sys; sys.modules['pandas'] = None; from benchmarks.command_line import main; "
        "sys.exit(main(['peers', '--quick']))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr == "error: pandas is missing: pip install -e bundles -e '.[benchmarks]'\n"


def test_numbers_are_checked(call_benchmarks: Command) -> None:
    assert call_benchmarks("tuning", "--seeds", "0").code == 2
