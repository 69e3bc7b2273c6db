"""The documents as a site: `make docs` builds it, and a link that leads nowhere fails it.

The command line's page is what `--help` says, and that of the metrics is what a service registers,
so that neither can be out of date.
"""

from __future__ import annotations

import argparse
import os
import re
from pathlib import Path

from sphinx.application import Sphinx

from codedinvnet.cli.command_line import build_parser
from codedinvnet.gateway.metrics import GatewayMetrics
from codedinvnet.serving.metrics import Metrics

HERE = Path(__file__).resolve().parent

project = "codedinvnet"
author = "The codedinvnet contributors"
html_show_copyright = False
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
html_theme = "furo"
html_title = "codedinvnet"
myst_heading_anchors = 3
myst_enable_extensions = ["colon_fence"]
default_role = "code"  # docstrings have `names` as Markdown does
autodoc_member_order = "bysource"
autodoc_typehints = "description"
autodoc_default_options = {"members": True}
exclude_patterns = [
    f"results/{page.name}"  # tables that `bench` writes next to its rows
    for page in (HERE / "results").glob("*.md")
    if page.stem not in ("summary", "tables", "protected")
]

OUTSIDE = re.compile(
    r"(?<!!)\[([^\]]+)\]\((?!https?:|docs/|mailto:|#)((?:\.\./)*[\w./-]+)(?:#[\w-]+)?\)"
)
"""A link to a file of the repository."""
README = re.compile(r"\]\((?:\.\./)+README\.md(#[\w-]+)?\)")


def setup(app: Sphinx) -> None:
    """Generate pages before they are read, and say where a file lies that is not on the site."""
    app.connect("builder-inited", generate)
    app.connect("source-read", outside)
    app.connect("autodoc-process-docstring", shapes)
    app.connect("include-read", lambda app, path, name, text: outside(app, name, text))


def generate(app: Sphinx) -> None:
    """Write the pages that the program tells of itself."""
    for name, text in (("command-line", command_line()), ("metrics", metrics())):
        page = HERE / "reference" / f"{name}.md"
        if not page.is_file() or page.read_text(encoding="utf-8") != text:
            page.write_text(text, encoding="utf-8")


def outside(app: Sphinx, name: str, text: list[str]) -> None:
    """Replace links to files that are no pages by their names."""

    def rewritten(link: re.Match[str]) -> str:
        target = (HERE / name).parent / link[2]
        page = target.suffix in (".md", ".png", ".svg") and target.is_file()
        page = page and HERE in target.resolve().parents
        return link[0] if page else f"{link[1]} (`{link[2].lstrip('./')}`)"

    text[0] = README.sub(lambda link: f"](index.md{link[1] or ''})", text[0])
    text[0] = OUTSIDE.sub(rewritten, text[0])


def shapes(app: Sphinx, *arguments: object) -> None:
    """Keep `(B, *shape)` of a docstring from being emphasis."""
    lines = arguments[-1]
    assert isinstance(lines, list)
    lines[:] = [re.sub(r"(?<=[ (])\*(?=\w+\))", r"\*", line) for line in lines]


def command_line() -> str:
    """Return what `--help` says of each command."""
    os.environ["COLUMNS"] = "100"
    os.environ["NO_COLOR"] = "1"  # from Python 3.14 on help has colours on a terminal
    parts = ["# Command line", "This page is what `--help` says.", *_commands(build_parser())]
    return "\n\n".join(parts) + "\n"


def _commands(parser: argparse.ArgumentParser) -> list[str]:
    """Return a section for a command, and for those below it."""
    parts = [f"## {parser.prog}", f"```text\n{parser.format_help().rstrip()}\n```"]
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for below in dict.fromkeys(action.choices.values()):
                parts += _commands(below)
    return parts


def metrics() -> str:
    """Return a table of the metrics of a service and of a gateway."""
    parts = [
        "# Metrics",
        "`/metrics` has them in Prometheus' text format. Buckets of histograms reach to 60 s.",
    ]
    both = ("A service", Metrics().registry), ("A gateway", GatewayMetrics().registry)
    for title, registry in both:
        parts.append(f"## {title}")
        table = ["| name | kind | labels | meaning |", "| --- | --- | --- | --- |"]
        for collector in registry._collector_to_names:
            labels = ", ".join(f"`{name}`" for name in getattr(collector, "_labelnames", ()))
            for family in collector.collect():
                if not family.name.startswith("codedinvnet_"):  # the process's
                    continue
                name = family.name + ("_total" if family.type == "counter" else "")
                meaning = family.documentation.replace("|", r"\|")
                table.append(f"| `{name}` | {family.type} | {labels} | {meaning} |")
        parts.append("\n".join(table))
    return "\n\n".join(parts) + "\n"
