"""Imports form no circle, neither among packages nor inside one."""

from __future__ import annotations

import ast
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path

import codedinvnet

ROOT = Path(codedinvnet.__file__).parent


def ring(package: str, *names: str) -> frozenset[str]:
    return frozenset(f"codedinvnet.{package}.{name}" for name in names)


KNOWN = {
    ring("gateway", "attempts", "proxy"),
    ring("gateway", "calls", "cluster"),
    ring("net", "answers", "server"),
}
"""Circles that are still to be mended; no other may come, and one that is gone leaves this list."""


def modules() -> dict[str, Path]:
    found = {}
    for path in ROOT.rglob("*.py"):
        parts = ("codedinvnet", *path.relative_to(ROOT).with_suffix("").parts)
        found[".".join(parts).removesuffix(".__init__")] = path
    return found


def imported(path: Path, known: Iterable[str]) -> set[str]:
    """Return the modules that a module imports, those for its types included."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                names.add(inner if inner in known else node.module)
    return names & set(known)


def circles(arrows: dict[str, set[str]]) -> list[list[str]]:
    """Return the sets of more than one that reach one another (Tarjan)."""
    order: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    found: list[list[str]] = []

    def visit(name: str) -> None:
        order[name] = low[name] = len(order)
        stack.append(name)
        for other in sorted(arrows[name]):
            if other not in order:
                visit(other)
            if other in stack:
                low[name] = min(low[name], low[other])
        if low[name] == order[name]:
            place = stack.index(name)
            around, stack[place:] = stack[place:], []
            if len(around) > 1:
                found.append(sorted(around))

    for name in sorted(arrows):
        if name not in order:
            visit(name)
    return found


def test_modules_form_no_circles_but_the_known_ones() -> None:
    known = modules()
    found = circles({name: imported(path, known) for name, path in known.items()})
    assert set(map(frozenset, found)) == KNOWN


def test_packages_form_no_circle_but_the_known_one() -> None:
    known, arrows = modules(), defaultdict[str, set[str]](set)
    for name, path in known.items():
        others = {package(other) for other in imported(path, known)}
        arrows[package(name)] |= others - {package(name)}
    known_one = ["codes", "scheduler"]  # names of policies
    assert circles(arrows) == [known_one]


def package(name: str) -> str:
    """Return the part of the source that a module is in."""
    return name.split(".")[1] if "." in name else name
