"""Python blocks on coding are executed; command lines of README and docs/ are parsed."""

from __future__ import annotations

import argparse
import itertools
import json
import re
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from benchmarks import command_line
from codedinvnet.cli import paper, paper_main
from codedinvnet.cli.command_line import build_parser
from tests.cli.test_command_line import commands as subcommands
from tests.conftest import Command

ROOT = Path(__file__).resolve().parents[1]
SETTINGS_FILES = ("config", "config_file", "grid", "scenario")
"""Options and arguments that name one."""
README = ROOT / "README.md"
DOCS = sorted((ROOT / "docs").rglob("*.md"))
PAGES = [README, *DOCS]
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
_FENCE = re.compile(r"^```(\w+)[^\n]*\n(.*?)^```\s*$", re.MULTILINE | re.DOTALL)
TEXT = README.read_text(encoding="utf-8") if README.is_file() else ""


def blocks(text: str, *languages: str) -> list[str]:
    return [code for language, code in _FENCE.findall(text) if language in languages]


def commands(text: str) -> list[str]:
    """Return the command lines of the shell blocks, continuations joined, comments left out."""
    lines: list[str] = []
    for block in blocks(text, "bash", "sh", "console", "shell"):
        for line in block.replace("\\\n", " ").splitlines():
            words = shlex.split(line.removeprefix("$ "), comments=True)
            # `VARIABLE=value program …`, and the program of a virtual environment
            while words and re.fullmatch(r"\w+=.*", words[0]):
                words = words[1:]
            if words and Path(words[0]).name == "python" and words[1:3] == ["-m", "codedinvnet"]:
                words = ["codedinvnet", *words[3:]]
            if words:
                lines.append(shlex.join([Path(words[0]).name, *words[1:]]))
    return lines


def own_commands(text: str) -> list[str]:
    own = ("codedinvnet ", "python -m benchmarks ")
    return [line for line in commands(text) if line.startswith(own)]


def parse(line: str) -> argparse.Namespace:
    """Parse a command line of the package's, or of the repository's benchmarks."""
    words = shlex.split(line)
    if words[0] == "codedinvnet":
        return build_parser().parse_args(words[1:])
    return command_line.build_parser().parse_args(words[3:])


CODING = README.parent / "docs" / "explanation" / "how-coding-works.md"
PYTHON = blocks(TEXT + CODING.read_text(encoding="utf-8"), "python", "py")
OWN = own_commands(TEXT)
PAPER = [line for line in commands(TEXT) if re.match(r"python3? (\./)?main\.py ", line)]
DOCUMENTED = {
    str(path.relative_to(ROOT / "docs")): own_commands(path.read_text(encoding="utf-8"))
    for path in DOCS
}


def test_there_is_something_to_run() -> None:
    assert README.is_file()
    assert PYTHON, "no ```python blocks"
    assert OWN, "no `codedinvnet …` lines in ```bash blocks"
    assert PAPER, "no `python main.py …` lines in ```bash blocks"
    for name in ("how-to/compare-methods.md", "how-to/gateway.md", "explanation/simulator.md"):
        assert DOCUMENTED[name], f"no `codedinvnet …` lines in {name}"


def test_python_blocks_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # what they write must not land in the repository
    namespace: dict[str, Any] = {"__name__": "readme"}
    for number, code in enumerate(PYTHON):
        exec(compile(code, f"python block {number + 1}", "exec"), namespace)


@pytest.mark.parametrize("line", [*OWN, *itertools.chain(*DOCUMENTED.values())])
def test_own_command_parses(line: str) -> None:
    if "--help" in line:
        with pytest.raises(SystemExit):
            parse(line)
        return
    arguments = parse(line)
    assert callable(arguments.run)
    check_files(arguments)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_benchmark_that_a_page_names_is_there(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    named = re.findall(r"(?:`|^|python -m )benchmarks ([a-z][a-z-]*)", text, re.MULTILINE)
    assert set(named) <= set(subcommands(command_line.build_parser()))


def installs(text: str) -> list[tuple[str, list[str]]]:
    """Return the options of each `pip install` of the repository that a text has, and the extras.

    They are those of `.[EXTRAS]`.
    """
    found = re.findall(r"pip install ([^`\n'\"]*)['\"]?\.\[([\w,]+)\]", text)
    return [(options.strip(), extras.split(",")) for options, extras in found]


EXTRAS = re.findall(
    r"^(\w+) = \[",
    (ROOT / "pyproject.toml")
    .read_text(encoding="utf-8")
    .split("[project.optional-dependencies]")[1],
    re.MULTILINE,
)


@pytest.mark.parametrize(
    "page",
    [path for path in [*PAGES, *EXAMPLES] if installs(path.read_text(encoding="utf-8"))],
    ids=lambda page: str(page.relative_to(ROOT)),
)
def test_a_clone_is_installed_as_it_stands(page: Path) -> None:
    """A copy would take the place of what `make setup` or another page has installed so."""
    for options, extras in installs(page.read_text(encoding="utf-8")):
        assert options == "-e"
        assert set(extras) <= set(EXTRAS)


METHOD_PAGE = DOCUMENTED["how-to/add-a-method.md"]


def test_the_page_on_methods_simulates_and_measures_one(
    tmp_path: Path, call: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its commands in short; tests/codes/test_registry.py serves the example."""
    monkeypatch.chdir(ROOT)
    (line,) = (line for line in METHOD_PAGE if line.startswith("codedinvnet simulate "))
    ran = call(*shlex.split(line)[1:], "--queries", "2000", "--json")
    assert json.loads(ran.out)["decoded_share"] > 0
    (line, *_) = (line for line in METHOD_PAGE if line.startswith("codedinvnet bench accuracy "))
    words = [*shlex.split(line)[1:], "--only", "dataset=mnist", "--out", tmp_path / "rows.jsonl"]
    with pytest.warns(UserWarning, match="only what needs no training"):
        ran = call(*words, "--data-dir", tmp_path, "--save-dir", tmp_path, "--json")
    assert json.loads(ran.out)["done"] == 3


@pytest.mark.parametrize("line", PAPER)
def test_paper_command_parses(line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    parsed: list[argparse.Namespace] = []
    monkeypatch.setattr(paper, "_paper", parsed.append)
    words: Sequence[str] = shlex.split(line)[2:]
    assert paper_main(words) == 0
    assert len(parsed) == 1
    check_files(parsed[0])


def check_files(arguments: argparse.Namespace) -> None:
    """Settings files that a command line names must be in the repository."""
    for key in SETTINGS_FILES:
        path = getattr(arguments, key, None)
        if path is not None and path.parts[0] == "configs":
            assert (ROOT / path).is_file(), f"{path} is not in the repository"
