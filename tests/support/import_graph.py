"""Which modules of a package import which, read from their source."""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping, Set
from pathlib import Path


def import_graph(sources: Mapping[str, str]) -> dict[str, set[str]]:
    """Module -> the modules that it imports: at its top, in functions and for types alone.

    Importing a module imports the packages that it is in; a package that the importer itself is in
    has been begun already, and does not count.

    Args:
        sources: name -> text, of modules and packages.
    """
    graph: dict[str, set[str]] = {}
    for name, text in sources.items():
        graph[name] = set()
        for imported in _imported(ast.parse(text)):
            parts = imported.split(".")
            for end in range(1, len(parts) + 1):
                module = ".".join(parts[:end])
                if module in sources and module != name and not name.startswith(f"{module}."):
                    graph[name].add(module)
    return graph


def circle(graph: Mapping[str, Set[str]]) -> list[str]:
    """A circle in a graph, its first member again at its end; nothing where there is none."""
    done: set[str] = set()
    for start in graph:
        way: list[str] = []
        pending = [iter((start,))]
        while pending:
            name = next(pending[-1], None)
            if name is None:
                pending.pop()
                if way:
                    done.add(way.pop())
            elif name in way:
                return [*way[way.index(name) :], name]
            elif name not in done:
                way.append(name)
                pending.append(iter(sorted(graph[name])))
    return []


def sources_of(folder: Path, package: str) -> dict[str, str]:
    """The modules of a package in a folder, by name."""
    found = {}
    for path in sorted(folder.rglob("*.py")):
        parts = path.relative_to(folder).with_suffix("").parts
        name = ".".join((package, *parts)).removesuffix(".__init__")
        found[name] = path.read_text(encoding="utf-8")
    return found


def _imported(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
