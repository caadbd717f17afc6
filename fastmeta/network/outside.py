"""What a forward reads from beyond its modules: globals, closures, and names in modules and classes
it imports.

Byte code says which names a function loads; functions that it can reach by them are looked into as
well.
"""

from __future__ import annotations

import dis
import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from random import SystemRandom
from types import (
    BuiltinFunctionType,
    BuiltinMethodType,
    CellType,
    CodeType,
    FunctionType,
    MethodType,
    ModuleType,
)
from typing import Any

_LIBRARIES = frozenset(sys.stdlib_module_names) - {"__main__"} | {"torch", "numpy", "fastmeta"}
_GLOBAL = ("LOAD_GLOBAL", "LOAD_NAME")
#: Modules whose functions answer otherwise at every call, though nothing that can be watched
#: changes; of some all do.
_ENTROPY: dict[str, frozenset[str] | None] = {
    "time": None,
    "secrets": None,
    "uuid": None,
    "datetime": frozenset({"now", "utcnow", "today"}),
    "os": frozenset({"urandom", "getrandom", "times"}),
    "random": frozenset({"SystemRandom"}),
}
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


def reads_of(starts: Iterable[Any], classes: Iterable[type], entropy: list[str] | None = None) -> list[Read]:
    """What functions read from outside, themselves or through what they call.

    Args:
        starts: functions, bound methods and partials to begin with; anything else is passed over.
        classes: whose methods and properties may be meant by an attribute's name.
        entropy: to this the places are added where the clock or the system's entropy is read.
    """
    found: dict[tuple[int, str], Read] = {}
    attributes: dict[str, list[Any]] = {}
    for cls in classes:
        for name, value in vars(cls).items():
            attributes.setdefault(name, []).append(value)
    starts = list(starts)
    if entropy is not None:
        entropy += [f"`{start!r}`" for start in starts if _reads_entropy(start, frozenset())]
    pending = [function for start in starts for function in _functions(start)]
    seen = set(map(id, pending))

    def follow(read: Read, names: frozenset[str]) -> None:
        key = id(read.namespace), read.name
        try:
            value = read.value()
        except (KeyError, ValueError):  # a builtin, or a cell that is still empty
            return
        if entropy is not None and _reads_entropy(value, names):
            entropy.append(read.place)
        if key in found:
            return
        if issubclass(type(value), (ModuleType, type)):
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


def _reads_entropy(value: Any, names: frozenset[str]) -> bool:
    """Whether code that loads `value`, and as attributes `names`, may read the clock or the
    system's entropy."""
    kind = type(value)
    if kind is ModuleType:
        return value.__name__ in _ENTROPY and _meant(value.__name__, names)
    if kind in (FunctionType, BuiltinFunctionType, type):
        module = _REAL_NAMES.get(value.__module__, value.__module__)
        meant = names if kind is type and value.__name__ != "SystemRandom" else names | {value.__name__}
        return module in _ENTROPY and _meant(module, meant)
    return kind in (MethodType, BuiltinMethodType) and type(value.__self__) is SystemRandom


def _meant(module: str, names: frozenset[str]) -> bool:
    wanted = _ENTROPY[module]
    return wanted is None or not wanted.isdisjoint(names)


#: What functions of a module say where they are from, if it is not that module.
_REAL_NAMES = {"posix": "os", "nt": "os", "_uuid": "uuid"}


def _functions(value: Any) -> Iterator[FunctionType]:
    """The Python functions behind something that can be called or looked up."""
    kind = type(value)  # what `__class__` says may be anything
    if kind is FunctionType:
        yield value
    elif issubclass(kind, (MethodType, staticmethod, classmethod)):
        yield from _functions(value.__func__)
    elif issubclass(kind, partial):
        yield from _functions(value.func)
    elif issubclass(kind, property):
        yield from _functions(value.fget)
