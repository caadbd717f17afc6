"""What a forward reads from beyond its modules: globals, closures, and names in modules and classes it imports.

Byte code says which names a function loads; functions that it can reach by them are looked into as well.
"""

from __future__ import annotations

import dis
import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from types import CellType, CodeType, FunctionType, MethodType, ModuleType
from typing import Any

_LIBRARIES = frozenset(sys.stdlib_module_names) - {"__main__"} | {"torch", "numpy", "fastmeta"}
_GLOBAL = ("LOAD_GLOBAL", "LOAD_NAME")
_ATTRIBUTE = ("LOAD_ATTR", "LOAD_METHOD", "LOAD_SUPER_ATTR")


@dataclass(frozen=True, slots=True)
class Read:
    """A name, and where it is looked up at every call.

    Args:
        place: for messages, e.g. "Net.forward: global `scale`".
        namespace: a module's globals, a class's attributes, or one cell of a closure.
        name: in the namespace; of a cell it means nothing.
    """

    place: str
    namespace: Mapping[str, Any] | CellType
    name: str

    def value(self) -> Any:
        """What stands there now.

        Raises:
            KeyError, ValueError: nothing does.
        """
        space = self.namespace
        return space.cell_contents if isinstance(space, CellType) else space[self.name]


def is_library(module: str | None) -> bool:
    """Whether a module is not the user's: what its code reads does not change from call to call."""
    return (module or "builtins").partition(".")[0] in _LIBRARIES


def reads_of(starts: Iterable[Any], classes: Iterable[type]) -> list[Read]:
    """What functions read from outside, themselves or through what they call.

    Args:
        starts: functions, bound methods and partials to begin with; anything else is passed over.
        classes: whose methods and properties may be meant by an attribute's name.
    """
    found: dict[tuple[int, str], Read] = {}
    attributes: dict[str, list[Any]] = {}
    for cls in classes:
        for name, value in vars(cls).items():
            attributes.setdefault(name, []).append(value)
    pending = [function for start in starts for function in _functions(start)]
    seen = set(map(id, pending))

    def follow(read: Read, names: frozenset[str]) -> None:
        key = id(read.namespace), read.name
        try:
            value = read.value()
        except (KeyError, ValueError):  # a builtin, or a cell that is still empty
            return
        if key in found:
            return
        if isinstance(value, (ModuleType, type)):
            if not is_library(value.__name__ if isinstance(value, ModuleType) else value.__module__):
                found[key] = read
                space = vars(value)
                for name in names & space.keys():
                    if not (name.startswith("__") or isinstance(space[name], (ModuleType, type))):
                        follow(Read(f"{value.__name__}.{name}", space, name), names)
            return
        functions = list(_functions(value))
        if not functions or not all(is_library(function.__module__) for function in functions):
            found[key] = read
        push(functions)

    def push(functions: Iterable[FunctionType]) -> None:
        for function in functions:
            if id(function) not in seen:
                seen.add(id(function))
                pending.append(function)

    while pending:
        function = pending.pop()
        if is_library(function.__module__):
            continue
        loaded = list(_loaded(function.__code__))
        names = frozenset(name for _, name in loaded)
        where = function.__qualname__
        for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
            if name != "__class__":
                follow(Read(f"{where}: closure `{name}`", cell, name), names)
        for is_global, name in loaded:
            if is_global:
                follow(Read(f"{where}: global `{name}`", function.__globals__, name), names)
            else:
                push(found for value in attributes.get(name, ()) for found in _functions(value))
    return list(found.values())


def _loaded(code: CodeType) -> Iterator[tuple[bool, str]]:
    """(whether it is a global, name) for all names that code loads, nested functions included."""
    for instruction in dis.get_instructions(code):
        if instruction.opname in _GLOBAL:
            yield True, str(instruction.argval)
        elif instruction.opname in _ATTRIBUTE:
            yield False, str(instruction.argval)
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _loaded(constant)


def _functions(value: Any) -> Iterator[FunctionType]:
    """The Python functions behind something that can be called or looked up."""
    if isinstance(value, FunctionType):
        yield value
    elif isinstance(value, (MethodType, staticmethod, classmethod)):
        yield from _functions(value.__func__)
    elif isinstance(value, partial):
        yield from _functions(value.func)
    elif isinstance(value, property):
        yield from _functions(value.fget)
