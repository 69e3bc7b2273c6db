"""The command lines: the project's own and the paper's. Each parses and calls one function."""

from codedinvnet.cli.command_line import main
from codedinvnet.cli.paper import paper_main

__all__ = ["main", "paper_main"]
