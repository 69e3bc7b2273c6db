"""What made a figure: the machine, the commit of the source, and the command that runs."""

from __future__ import annotations

import platform
import re
import subprocess
import sys
from pathlib import Path
from typing import Any


def describe_machine() -> str:
    """Return the kind of machine in words: system, processor, threads, GPU, versions.

    A program that has not loaded PyTorch has no threads of it, nor a GPU.
    """
    torch: Any = sys.modules.get("torch")
    words = [f"{platform.machine()} {platform.system()}", processor_name()]
    if torch is not None:
        threads = torch.get_num_threads()
        words.append(f"{threads} thread{'s' if threads > 1 else ''}")
        words.append(torch.cuda.get_device_name() if torch.cuda.is_available() else "")
    words.append(f"Python {platform.python_version()}")
    if torch is not None:
        words.append(f"torch {torch.__version__}")
    return ", ".join(filter(None, words))


def processor_name(cpuinfo: Path = Path("/proc/cpuinfo")) -> str:
    """Return what Linux calls the processor, elsewhere what Python does; "" if nothing does.

    Args:
        cpuinfo: Linux's file.
    """
    try:
        text = cpuinfo.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return platform.processor()
    found = re.search(r"^model name\s*: *(.*)$", text, re.MULTILINE)
    return found[1] if found else ""


def describe_commit() -> str:
    """Return the commit of the source tree, "+changes" if it has any, or the release's version."""
    root = Path(__file__).resolve().parents[3]

    def git(*words: str) -> str:
        command = ["git", "-C", str(root), *words]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        if Path(git("rev-parse", "--show-toplevel")).resolve() != root:
            raise OSError("this is somebody's repository around an installed package")
        changed = git("status", "--porcelain", "--", "src", "benchmarks")
        return git("rev-parse", "HEAD") + ("+changes" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        from importlib.metadata import version

        return f"codedinvnet {version('codedinvnet')}"


def describe_command() -> str:
    """Return the command line that runs now, without folders of this machine."""
    program = Path(sys.argv[0])
    name = f"python -m {program.parent.name}" if program.stem == "__main__" else program.name
    return " ".join([name, *map(without_folders, sys.argv[1:])])


def without_folders(word: str) -> str:
    """Return a path as seen from the working directory, or its last part if it lies elsewhere.

    Other words stay as they are.

    Args:
        word: of a command line; what follows an option's `=` is a path as well.
    """
    option, equals, value = word.rpartition("=")
    path = Path(value)
    if not path.is_absolute():
        return word
    here = Path.cwd()
    seen = str(path.relative_to(here)) if path.is_relative_to(here) else path.name
    return option + equals + seen
