"""Random generators of the user's own that a forward pass can draw from, beside those that are
global.

They are looked for where a forward finds them: attributes of modules and of the objects in these,
bound methods, closures, default arguments, and the globals that its byte code reads.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from itertools import islice
from types import BuiltinMethodType, FunctionType, MethodType
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn

from fastmeta.network.outside import Read, reads_of

_OF_EVERY_MODULE = frozenset(vars(nn.Module())) - {"_modules"}
#: Looked at in one search, so that huge containers cost little.
_MOST_OBJECTS = 2000
_PLAIN = frozenset(
    {type(None), bool, int, float, complex, str, bytes, torch.Tensor, nn.Parameter, torch.Size, range}
)

#: What a network's own functions read from outside, as far as generators were there, and the types
#: it was found for.
_READS: WeakKeyDictionary[nn.Module, tuple[tuple[type, ...], list[Read]]] = WeakKeyDictionary()


def generators_of(
    net: nn.Module | None, functions: Iterable[Callable[..., Any] | None] = ()
) -> tuple[Any, ...]:
    """The generator objects that a network and functions such as its losses may draw from.

    Args:
        net: the module.
        functions: losses; None is passed over.

    Returns:
        Objects of `torch.Generator`, `random.Random` and NumPy's `Generator`, `RandomState` and bit
        generators, each once. A read of a global that held none when the network was first seen is
        not looked at again.
    """
    given = [function for function in functions if function is not None]
    starts: list[Any] = list(given)
    if net is not None:
        starts += [net, *_read(net)]
    for function in given:
        starts += _values(reads_of([function], ()))
    return tuple(_search(starts))


def _read(net: nn.Module) -> list[Any]:
    """What stands now in the globals and closures where the network's functions found
    generators."""
    types = tuple(map(type, net.modules()))
    known = _READS.get(net)
    if known is None or known[0] != types:
        classes = list(dict.fromkeys(cls for kind in types for cls in kind.__mro__ if not _of_torch(cls)))
        held = [
            v for module in net.modules() for name, v in vars(module).items() if name not in _OF_EVERY_MODULE
        ]
        reads = reads_of([*(getattr(cls, "forward", None) for cls in classes), *held], classes)
        # a read that is kept must not keep the network alive: only those whose value is, or holds,
        # a generator
        known = _READS[net] = types, [read for read in reads if any(True for _ in _search(_values([read])))]
    return _values(known[1])


def _of_torch(cls: type) -> bool:
    return cls.__module__.partition(".")[0] in ("torch", "builtins", "abc", "typing")


def _values(reads: Iterable[Read]) -> list[Any]:
    found = []
    for read in reads:
        try:
            value = read.value()
        except (KeyError, ValueError):  # gone meanwhile
            continue
        if not isinstance(value, nn.Module):
            found.append(value)
    return found


def _search(starts: list[Any]) -> Iterator[Any]:
    pending, seen = starts, set[int]()
    kinds, known = _kinds()
    while pending and len(seen) < _MOST_OBJECTS:
        value = pending.pop()
        if type(value) in _PLAIN or id(value) in seen:
            continue
        seen.add(id(value))
        if issubclass(type(value), kinds):  # not isinstance: `__class__` of a user's object may be anything
            if not any(value is own for own in known) and not issubclass(type(value), random.SystemRandom):
                yield value
        else:
            pending.extend(_inside(value))


def _inside(value: Any) -> Iterable[Any]:
    """What an object holds where a forward can find it."""
    kind = type(value)
    if issubclass(kind, nn.Module):
        return [
            v for name, v in vars(value).items() if name not in _OF_EVERY_MODULE and type(v) not in _PLAIN
        ]
    if kind is dict:
        return list(islice(value.values(), _MOST_OBJECTS))
    if kind in (list, tuple):
        return value[:_MOST_OBJECTS]
    if kind in (MethodType, BuiltinMethodType):
        return (value.__self__,)
    if kind is partial:
        return (value.func, *value.args, *value.keywords.values())
    if kind is FunctionType:
        return [*(value.__defaults__ or ()), *(value.__kwdefaults__ or {}).values()]
    if issubclass(kind, type) or kind.__module__.partition(".")[0] in ("torch", "numpy", "builtins"):
        return ()
    try:
        attributes = vars(value)
    except Exception:  # it has none, or hides them
        return ()
    return list(attributes.values()) if type(attributes) is dict else ()


def _kinds() -> tuple[tuple[type, ...], tuple[Any, ...]]:
    """(types of generators, the global ones, which are taken care of elsewhere)."""
    numpy = sys.modules.get("numpy.random")
    if numpy is None:
        return (torch.Generator, random.Random), (random.seed.__self__, torch.default_generator)  # type: ignore[attr-defined]
    return (
        (torch.Generator, random.Random, numpy.Generator, numpy.RandomState, numpy.BitGenerator),
        (random.seed.__self__, torch.default_generator, numpy.mtrand._rand),  # type: ignore[attr-defined]
    )
