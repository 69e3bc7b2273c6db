"""The command `serve`."""

from __future__ import annotations

import argparse

from codedinvnet.cli.common import Commands, add_command
from codedinvnet.cli.options import add_options, options_of


def add_commands(commands: Commands) -> None:
    """Add `serve`, whose options are those of `ServeOptions`."""
    from codedinvnet.serving.config import ServeOptions

    sub = add_command(
        commands,
        "serve",
        _serve,
        "serve a model over HTTP (Open Inference Protocol V2), through slow and dead workers",
        "codedinvnet serve mnist --k 10 --policy coded --demo",
    )
    add_options(sub, ServeOptions)


def _serve(arguments: argparse.Namespace) -> None:
    from codedinvnet.serving.app import serve
    from codedinvnet.serving.config import ServeOptions

    serve(options_of(arguments, ServeOptions))
