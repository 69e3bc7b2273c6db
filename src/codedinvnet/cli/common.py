"""What the commands share: adding one, its options, refusals, and reports."""

from __future__ import annotations

import argparse
import json
import os
import re
import select
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import wraps
from typing import TYPE_CHECKING, Any, NoReturn, TypeAlias

from codedinvnet.common.errors import UserError, nearest

if TYPE_CHECKING:
    from codedinvnet.common.config import Settings

Action: TypeAlias = "Callable[[argparse.Namespace], int | None]"
Commands: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"


CLOSED = 141
"""Exit code of a command whose reader is gone, as of one that SIGPIPE ends."""
OF_MODELS = frozenset(
    [
        "numpy",
        "tqdm",
        "torch",
        "torchvision",
        "pandas",
        "scipy",
        "safetensors",
        "PIL",
        "matplotlib",
        "tensorboard",
    ]
)
"""What the extra `models` installs, as it is imported."""
ALLOCATOR = "DefaultCPUAllocator"
"""Behind a place in its own code, PyTorch's word for too little memory, which is of no own type."""
SPINS = "10000"
"""Turns for which a thread of GNU OpenMP, PyTorch's, waits for others at full speed."""


class CommandParser(argparse.ArgumentParser):
    """The parser of a command. It refuses unknown words itself, by its own usage and near names.

    A positional that may be left out may also stand behind options. `argparse` takes it for left
    out as soon as an option follows the positional before it. Options are not abbreviated.
    """

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings, allow_abbrev=False)

    def error(self, message: str) -> NoReturn:
        """Refuse; say which of a list of words was likely meant."""
        found = re.search(r"invalid choice: '(.*)' \(choose from (.*)\)", message)
        near = nearest(found[1], re.findall(r"[\w-]+", found[2])) if found else None
        if found and near:
            message = f"{found[1]!r} is not known; did you mean {near!r}?"
        super().error(message)

    def parse_known_args(
        self, args: Iterable[str] | None = None, namespace: Any = None
    ) -> tuple[Any, list[str]]:
        """Parse; return what was found, and no words: what nothing takes is wrong usage."""
        found, rest = super().parse_known_args(args, namespace)
        for action in self._actions:
            optional = action.nargs == "?" and not action.option_strings
            empty = optional and getattr(found, action.dest, "") is None
            if empty and len(rest) == 1 and not rest[0].startswith("-"):
                action(self, found, self._get_values(action, rest))
                rest = []
        if rest:
            self.error(f"unrecognized arguments: {' '.join(rest)}{self._meant(rest)}")
        return found, rest

    def _meant(self, words: Sequence[str]) -> str:
        """Say which options were likely meant by unknown ones."""
        names = [name for action in self._actions for name in action.option_strings]
        known = [name[2:] for name in names if name.startswith("--")]
        given = [word[2:].partition("=")[0] for word in words if word.startswith("--")]
        near = {f"--{name}": None for name in (nearest(word, known) for word in given) if name}
        return f"; did you mean {', '.join(near)}?" if near else ""


@contextmanager
def _terminated_as_interrupted() -> Iterator[None]:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _nobody_reads() -> bool:
    """Tell whether standard output leads nowhere (`| head`), and let its rest be lost quietly."""
    output = select.poll()
    try:
        output.register(sys.stdout.fileno(), select.POLLOUT)
    except OSError:  # no file of the system: captured
        return False
    if not any(event & select.POLLERR for _, event in output.poll(0)):
        return False
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for the flush at the end
    return True


def _wait_briefly() -> None:
    """Have threads of PyTorch wait a short time for one another before they give up their core.

    By default each spins for 300,000 turns, milliseconds, at the end of every operation. Where
    other programs keep the cores busy, the thread that is waited for has none meanwhile, and small
    operations take up to a hundred times as long. It is read when PyTorch is loaded, and workers
    inherit it. What the user has set stands.
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", SPINS)


def flushing_denormals(run: Action) -> Action:
    """Have every thread of a command that trains take denormal numbers for zero.

    `train_stage` does so itself, but in its own thread alone. Those of PyTorch inherit it when they
    start, so such a command does it before it computes anything.
    """

    @wraps(run)
    def flushing(arguments: argparse.Namespace) -> int | None:
        from codedinvnet.common.devices import denormals_flushed

        with denormals_flushed():
            return run(arguments)

    return flushing


def guarded(call: Callable[[], int | None], kept: str = "") -> int:
    """Turn a user's mistake into one line on standard error and exit code 2.

    SIGTERM ends a command as Ctrl-C does: what it has started, servers for one, ends with it.

    Args:
        call: the command, which may return an exit code.
        kept: what is left of it when it is interrupted, for the message.
    """
    warnings.formatwarning = lambda message, *_args, **_kwargs: f"warning: {message}\n"
    _wait_briefly()
    try:
        with _terminated_as_interrupted():
            return call() or 0
    except KeyboardInterrupt:
        print("interrupted" + (f"; {kept}" if kept else ""), file=sys.stderr)
        return 130
    except UserError as error:
        why = str(error)
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] not in OF_MODELS:
            raise
        how = "pip install 'codedinvnet[models]', in a clone -e bundles -e '.[models]'"
        why = f"this needs {error.name}: {how}"
    except OSError as error:  # a full disk, a folder that may not be written
        if isinstance(error, BrokenPipeError) and _nobody_reads():
            return CLOSED
        where = f"{error.filename}: " if error.filename else ""
        why = f"{where}{error.strerror or error}"
    except (MemoryError, RuntimeError) as error:  # numpy and PyTorch say how much was asked for
        said = str(error)
        of_gpu, of_cpu = type(error).__name__ == "OutOfMemoryError", said.find(ALLOCATOR)
        if not (isinstance(error, MemoryError) or of_gpu or of_cpu >= 0):
            raise
        said = said[max(0, of_cpu) :].partition("\n")[0]
        why = f"too little memory: {said}".rstrip(": ")
    print(f"error: {why}", file=sys.stderr)
    return 2


def add_command(
    commands: Commands, name: str, run: Action, summary: str, example: str
) -> argparse.ArgumentParser:
    """Add a command with its help and return its parser."""
    sub = commands.add_parser(
        name,
        help=summary,
        description=summary[0].upper() + summary[1:] + ".",
        epilog=f"example:\n  {example}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    sub.set_defaults(run=run)
    return sub


def seed(text: str) -> int:
    """Parse a seed within the range of the settings', which every random generator takes."""
    value = int(text)
    if not 0 <= value < 2**31:
        raise argparse.ArgumentTypeError(f"must be in 0..{2**31 - 1}, got {text}")
    return value


Option: TypeAlias = tuple[str, dict[str, Any]]
"""An option or a positional argument: its name, and what `add_argument` takes besides."""


def opt(
    name: str, text: str, kind: Any = str, default: Any = None, *, unset: str = "", **more: Any
) -> Option:
    """Return an option.

    Args:
        name: of the option, or of a positional argument.
        text: for `--help`, which also states the default.
        kind: its type; `bool` for a switch, `list` for an option that may be repeated.
        default: its value if nothing is said.
        unset: what happens then, where the default does not say so.
        more: arguments of `add_argument`.
    """
    shown = unset or ("" if default is None else f"{default:g}" if kind is float else default)
    more["help"] = f"{text} ({shown})" if shown != "" else text
    if kind is bool:
        return name, {"action": "store_true", **more}
    if kind is list:
        return name, {"action": "append", "default": [], **more}
    return name, {"type": kind, "default": default, **more}


def members_of(settings: Settings, asked: int | None) -> int:
    """Return the given group size, or the settings'; raise UserError if it is below 2."""
    from codedinvnet.codes.base import check_k

    members = settings.fusion.members if asked is None else asked
    check_k(members)
    return members


def print_report(report: dict[str, Any], as_json: bool) -> None:
    """Print a report: one JSON object, or a line a key."""
    if as_json:
        print(json.dumps(report))
        return
    width = max(len(key) for key in report)
    for key, value in report.items():
        text = json.dumps(value) if isinstance(value, (dict, list)) else value
        print(f"{key:<{width}}  {text}")
