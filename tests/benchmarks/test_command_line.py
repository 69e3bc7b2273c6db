from __future__ import annotations

import inspect
import shlex
from importlib import import_module

import pytest

from benchmarks.command_line import BENCHMARKS, build_parser
from tests.cli.test_command_line import commands
from tests.conftest import Command


@pytest.mark.parametrize("name", commands(build_parser()))
def test_help_shows_an_example_that_parses(name: str, call_benchmarks: Command) -> None:
    outcome = call_benchmarks(name, "--help")
    assert outcome.code == 0
    example = outcome.out.split("example:\n")[1].strip()
    assert example.startswith(f"python -m benchmarks {name} ")
    assert callable(build_parser().parse_args(shlex.split(example)[3:]).run)


def test_help_lists_the_benchmarks(call_benchmarks: Command) -> None:
    outcome = call_benchmarks("--help")
    assert outcome.code == 0
    examples = outcome.out.split("examples:\n")[1].split("\n\n")[0].splitlines()
    assert [shlex.split(e)[3] for e in examples] == list(commands(build_parser()))
    for example in examples:
        assert callable(build_parser().parse_args(shlex.split(example)[3:]).run)


def test_options_are_the_parameters_of_a_function(call_benchmarks: Command) -> None:
    for name in BENCHMARKS:
        module = import_module(f"benchmarks.{name.replace('-', '_')}")
        parameters = set(inspect.signature(module.run).parameters)
        words = shlex.split(BENCHMARKS[name].example)
        given = set(vars(build_parser().parse_args([name, *words])))
        assert given - {"run", "benchmark", "json"} == parameters
    assert call_benchmarks("trust", "--runs", "0").code == 2
