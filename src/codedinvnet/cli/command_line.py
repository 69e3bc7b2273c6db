"""The project's command line: parse, and call one function."""

from __future__ import annotations

import argparse
import textwrap
from collections.abc import Sequence

from codedinvnet.cli.commands import COMMANDS
from codedinvnet.cli.common import CommandParser, Commands, add_command, guarded
from codedinvnet.cli.options import add_options

EXAMPLES = """examples:
  codedinvnet demo
  codedinvnet evaluate mnist --k 10 --data-dir data --json
  codedinvnet info mnist
  codedinvnet serve mnist --k 10
  codedinvnet reproduce configs/alone/mnist.json --data-dir data

configs/, examples/ and docs/ are in the repository, and not in an installed package; so are
the paper's four commands: python main.py --help
"""


class _Version(argparse.Action):
    """Prints the version and ends; it is looked up only then."""

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> None:
        from importlib.metadata import version

        print(f"codedinvnet {version('codedinvnet')}")
        parser.exit()


def main(argv: Sequence[str] | None = None) -> int:
    """Run `codedinvnet`; return the exit code."""
    arguments = build_parser().parse_args(argv)
    return guarded(lambda: arguments.run(arguments), _kept(arguments))


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
        description="Prediction serving that survives slow and dead workers (Coded-InvNet).\n",
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
    groups: dict[str, list[str]] = {}
    for group, name, summary, example, options, run in COMMANDS:
        first, _, second = name.partition(" ")
        place = commands
        if second:
            above = commands.add_parser(first, description=f"{summary.capitalize()}.")
            place = above.add_subparsers(title="commands", required=True, metavar="COMMAND")
        sub = add_command(place, second or first, run, summary, example)
        for option in options:
            if isinstance(option, tuple):
                sub.add_argument(option[0], **option[1])
            else:
                add_options(sub, option)
        text = ("\n" + " " * 13).join(textwrap.wrap(summary, 64))
        groups.setdefault(f"{group}:", []).append(f"  {first:<11}{text}")
    listed = [line for group, lines in groups.items() for line in (group, *lines)]
    parser.description = "\n".join([str(parser.description), *listed])
    return parser
