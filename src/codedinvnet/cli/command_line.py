"""The project's command line: parse, and call one function."""

from __future__ import annotations

import argparse
import textwrap
from collections.abc import Callable, Mapping, Sequence

from codedinvnet.cli import bench, bundles, protect, serving, simulate, training
from codedinvnet.cli.common import CommandParser, Commands, guarded

# Here and in the modules of the commands, heavy imports wait until a command runs, so that --help
# and wrong usage answer at once.

EXAMPLES = """examples:
  codedinvnet demo
  codedinvnet evaluate mnist --k 10 --data-dir data --json
  codedinvnet info mnist
  codedinvnet serve mnist --k 10
  codedinvnet reproduce configs/mnist-recovery.json --data-dir data

configs/, examples/ and docs/ are in the repository, and not in an installed package; so are
the paper's four commands: python main.py --help
"""

GROUPS = {
    "serve": ("serve", "gateway", "policy", "demo"),
    "protect": ("protect", "calibrate", "info"),
    "compare": ("bench", "simulate", "plan", "evaluate", "invert"),
    "paper": ("reproduce",),
}
"""The commands as `--help` lists them."""


class _Version(argparse.Action):
    """Prints the version and ends; it is looked up only then."""

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> None:
        from importlib.metadata import version

        print(f"codedinvnet {version('codedinvnet')}")
        parser.exit()


def main(argv: Sequence[str] | None = None) -> int:
    """Run `codedinvnet`; return the exit code."""
    arguments = build_parser().parse_args(argv)
    command: Callable[[argparse.Namespace], None] = arguments.run
    return guarded(lambda: command(arguments), _kept(arguments))


def _kept(arguments: argparse.Namespace) -> str:
    """Say how a command goes on that was interrupted, if it can."""
    if getattr(arguments, "fresh", False):
        return "finished epochs are kept: the same command without --fresh goes on"
    if hasattr(arguments, "minutes"):
        return "what the model was asked and finished epochs are kept: the same command goes on"
    if hasattr(arguments, "save_dir"):
        return "finished epochs and rows are kept: the same command goes on"
    return ""


def build_parser() -> argparse.ArgumentParser:
    """Build the parser of `codedinvnet` with all its commands."""
    parser: argparse.ArgumentParser = CommandParser(
        prog="codedinvnet",
        usage="%(prog)s [-h] [--version] COMMAND ...",
        description="Prediction serving that survives slow and dead workers (Coded-InvNet).",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--version",
        action=_Version,
        nargs=0,
        default=argparse.SUPPRESS,  # no command has it among its options
        help="print the version and exit",
    )
    kind: type[argparse.ArgumentParser] = CommandParser
    commands: Commands = parser.add_subparsers(
        title="commands",
        prog="codedinvnet",
        required=True,
        metavar="COMMAND",
        parser_class=kind,
        help=argparse.SUPPRESS,  # the description lists them in groups
    )
    for module in (serving, bundles, protect, bench, simulate, training):
        module.add_commands(commands)
    parser.description = f"{parser.description}\n\n{_listed(commands.choices)}"
    return parser


def _listed(parsers: Mapping[str, argparse.ArgumentParser]) -> str:
    """Return the commands in their groups, with what each does."""
    lines = []
    for group, names in GROUPS.items():
        lines.append(f"{group}:")
        for name in names:
            summary = (parsers[name].description or "").partition("\n")[0].rstrip(".")
            text = textwrap.wrap(summary[:1].lower() + summary[1:], 64)
            first, *rest = text or [""]
            lines += [f"  {name:<11}{first}", *(" " * 13 + more for more in rest)]
    return "\n".join(lines)
