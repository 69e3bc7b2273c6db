"""Python blocks on coding are executed; command lines of README and docs/ are parsed."""

from __future__ import annotations

import argparse
import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest

from benchmarks import command_line
from codedinvnet.cli import paper, paper_main
from codedinvnet.cli.command_line import build_parser
from tests.cli.test_command_line import commands as subcommands
from tests.conftest import Command
from tests.pages import FENCE, ROOT

SETTINGS_FILES = ("config", "config_file", "grid", "scenario", "sweep")
"""Options and arguments that name one."""
README, DOCS = ROOT / "README.md", ROOT / "docs"
PAGES = {
    str(path.relative_to(ROOT)): path.read_text(encoding="utf-8")
    for path in (README, *sorted(DOCS.rglob("*.md")), *sorted((ROOT / "examples").glob("*.py")))
}


def blocks(text: str, *languages: str) -> list[str]:
    return [code for language, code in FENCE.findall(text) if language in languages]


def commands(text: str) -> list[list[str]]:
    """Return the command lines of the shell blocks, continuations joined, comments left out."""
    lines: list[list[str]] = []
    for block in blocks(text, "bash", "sh", "console", "shell"):
        for line in block.replace("\\\n", " ").splitlines():
            words = shlex.split(line.removeprefix("$ "), comments=True)
            # `VARIABLE=value program …`, and the program of a virtual environment
            while words and re.fullmatch(r"\w+=.*", words[0]):
                words = words[1:]
            if words and Path(words[0]).name == "python" and words[1:3] == ["-m", "codedinvnet"]:
                words = ["codedinvnet", *words[3:]]
            if words:
                lines.append([Path(words[0]).name, *words[1:]])
    return lines


def parse(words: list[str]) -> argparse.Namespace | None:
    """Parse a command line of the package's, or of the repository's benchmarks."""
    if words[0] == "codedinvnet":
        return build_parser().parse_args(words[1:])
    if words[:3] == ["python", "-m", "benchmarks"]:
        return command_line.build_parser().parse_args(words[3:])
    return None


@pytest.mark.parametrize("page", PAGES)
def test_the_commands_of_a_page_are_there(page: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """And so are the settings, benchmarks and extras that it names."""
    parsed: list[argparse.Namespace] = []
    monkeypatch.setattr(paper, "_paper", parsed.append)
    for words in commands(PAGES[page]):
        if "--help" in words:
            with pytest.raises(SystemExit, match=r"^0$"):
                parse(words)
        elif words[0] in ("python", "python3") and words[1:2] in (["main.py"], ["./main.py"]):
            assert paper_main(words[2:]) == 0
        elif found := parse(words):
            assert callable(found.run)
            parsed.append(found)
    for arguments in parsed:
        for path in filter(None, (getattr(arguments, key, None) for key in SETTINGS_FILES)):
            assert Path(path).parts[0] != "configs" or (ROOT / path).is_file(), path
    named = re.findall(r"(?:`|^|python -m )benchmarks ([a-z][a-z-]*)", PAGES[page], re.MULTILINE)
    assert set(named) <= set(subcommands(command_line.build_parser()))
    extras = (ROOT / "pyproject.toml").read_text().split("[project.optional-dependencies]")[1]
    for options, names in re.findall(r"pip install ([^`\n'\"]*)['\"]?\.\[([\w,]+)\]", PAGES[page]):
        # A copy would take the place of what `make setup` installed.
        assert options.strip() in ("-e", "-e bundles -e")
        assert set(names.split(",")) <= set(re.findall(r"^(\w+) = \[", extras, re.MULTILINE))


def test_the_papers_four_commands_are_in_readme() -> None:
    assert sum("main.py" in " ".join(words[:2]) for words in commands(PAGES["README.md"])) == 4


def test_python_blocks_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # what they write must not land in the repository
    namespace: dict[str, Any] = {"__name__": "readme"}
    text = PAGES["README.md"] + PAGES["docs/explanation/how-coding-works.md"]
    for number, code in enumerate(blocks(text, "python", "py")):
        exec(compile(code, f"python block {number + 1}", "exec"), namespace)
    assert namespace["lost"].shape[-1] == 10


def test_the_page_on_methods_simulates_and_measures_one(
    tmp_path: Path, call: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its commands in short; tests/codes/test_registry.py serves the example."""
    monkeypatch.chdir(ROOT)
    lines = [line[1:] for line in commands(PAGES["docs/how-to/add-a-method.md"])]
    (words,) = (words for words in lines if words[0] == "simulate")
    ran = call(*words, "--queries", "2000", "--json")
    assert json.loads(ran.out)["decoded_share"] > 0
    words = next(words for words in lines if words[:2] == ["bench", "accuracy"])
    words += ["--only", "dataset=mnist", "--out", str(tmp_path / "rows.jsonl"), "--json"]
    with pytest.warns(UserWarning, match="only what needs no training"):
        ran = call(*words, "--data-dir", tmp_path, "--save-dir", tmp_path)
    assert json.loads(ran.out)["done"] == 3
