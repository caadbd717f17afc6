"""Whether a network is still the one that was captured.

A guard is a flat record of everything that a forward can read besides its input: the modules and
their types, their attributes (the training flag among them), hooks, which parameters there are,
which of them are tied, their shapes, and those of buffers. Values of tensors are no part of it, so
that parameters may be trained or replaced. The guard is checked at every training step. It compares
by identity first, in a few calls of C code. Globals and closures that the user's own code reads are
part of it too (`fastmeta/network/outside.py`).
"""

from __future__ import annotations

import functools
import logging
from enum import Enum
from itertools import chain
from operator import attrgetter, is_
from types import BuiltinFunctionType, FunctionType, MethodType, ModuleType, SimpleNamespace
from typing import Any
from weakref import ref

import torch
from torch import Tensor, nn
from torch.nn.modules import module as _module

from fastmeta.network.outside import reads_of

#: Where a module keeps its hooks on the call.
HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_GLOBAL_HOOKS = tuple(getattr(_module, f"_global{name}") for name in HOOKS)
#: What every module has and no forward reads, or what has a check of its own (hooks, parameters).
_MODULE_ATTRIBUTES = frozenset(vars(nn.Module())) - {"training", "_buffers", "_modules"}
#: Where recurrent layers list their parameters; they list anew whenever they find other ones.
_OF_PARAMETERS = frozenset({"_flat_weights", "_flat_weight_refs"})
_NUMBERS_AND_NAMES = (type(None), bool, int, float, complex, str, bytes, range, Enum)
_CODE = (type, FunctionType, BuiltinFunctionType, ModuleType, logging.Logger)
_OF_TORCH = (torch.dtype, torch.device, torch.memory_format, torch.layout)
#: Types whose values do not change.
_ATOMS = (*_NUMBERS_AND_NAMES, *_CODE, *_OF_TORCH)
_shape = attrgetter("shape")
_requires_grad = attrgetter("requires_grad")
_joined = chain.from_iterable


class Guard:
    """What a network was when it was captured; see the top of this file.

    The guard holds no reference to the network itself, so that it does not keep it alive.
    """

    def __init__(self, net: nn.Module) -> None:
        named = dict(net.named_modules())
        modules = list(named.values())
        #: Attributes whose changes cannot be watched, e.g. "net.table (numpy.ndarray)".
        self.unwatched: list[str] = []
        self._items = 0  # in containers, so far
        self._hooks = (*_GLOBAL_HOOKS, *(vars(module)[name] for module in modules for name in HOOKS))
        self.hooked = any(self._hooks)
        self._children = modules[1:]
        self._types = [*map(type, modules)]
        self._child_attributes = [*map(vars, self._children)]
        self._registered = frozenset(map(id, modules))
        self._objects: dict[int, tuple[ref[Any] | dict[str, Any], Any]] = {}
        self._attributes = [self._module_attributes(name, module) for name, module in named.items()]
        self._classes = _user_classes(modules)
        self._class_attributes = [self._frozen_class(cls) for cls in self._classes]
        #: Where the forward reads the clock or entropy, e.g. "Net.forward: `os.urandom`".
        self.entropy: list[str] = []
        called = [getattr(cls, "forward", None) for cls in self._classes]
        held = [
            value
            for module in modules
            for key, value in vars(module).items()
            if key not in _MODULE_ATTRIBUTES
        ]
        reads = reads_of(
            [*called, *held], [*self._classes, *map(type, filter(_is_plain, held))], self.entropy
        )
        # a function's closure over the network itself: its modules are guarded anyway
        self._outside = [read for read in reads if id(read.value()) not in self._registered]
        self._outside_values = [self._frozen(read.value(), read.place, ()) for read in self._outside]
        self._parameter_dicts = [module._parameters for module in modules if module._parameters]
        self._without_parameters = [module._parameters for module in modules if not module._parameters]
        self._names = [*_joined(self._parameter_dicts)]
        self._set_parameters([*_joined(map(dict.values, self._parameter_dicts))])
        self._ties = _ties(self._parameters)
        self._shapes = [*map(_shape, self._tensors)]
        self._buffer_dicts = [module._buffers for module in modules if module._buffers]
        self._buffer_sorts = self._sorts_of_buffers()

    def holds(self, net: nn.Module) -> bool:
        """Whether nothing that a capture depends on has changed."""
        try:
            return (
                any(self._hooks) is self.hooked
                and [vars(net), *self._child_attributes] == self._attributes
                and [type(net), *map(type, self._children)] == self._types
                and self._same_parameters()
                and (not self._buffer_dicts or self._sorts_of_buffers() == self._buffer_sorts)
                and (not self._classes or [*map(vars, self._classes)] == self._class_attributes)
                and (not self._outside or [read.value() for read in self._outside] == self._outside_values)
                and (
                    not self._objects
                    or all(_watched(live) == frozen for live, frozen in self._objects.values())
                )
            )
        except Exception:  # attributes of any type are compared here; one that cannot be has changed
            return False

    def requires_grad(self) -> tuple[bool, ...]:
        """Which of the parameters that `holds` saw last require grad; no part of the record."""
        return tuple(map(_requires_grad, self._tensors))

    def _same_parameters(self) -> bool:
        if any(self._without_parameters) or [*_joined(self._parameter_dicts)] != self._names:
            return False
        if not all(map(is_, _joined(map(dict.values, self._parameter_dicts)), self._parameters)):
            replaced = [*_joined(map(dict.values, self._parameter_dicts))]
            if _ties(replaced) != self._ties:
                return False
            self._set_parameters(replaced)
        return [*map(_shape, self._tensors)] == self._shapes

    def _sorts_of_buffers(self) -> list[tuple[torch.Size, torch.dtype] | None]:
        buffers = _joined(map(dict.values, self._buffer_dicts))
        return [None if buffer is None else (buffer.shape, buffer.dtype) for buffer in buffers]

    def _set_parameters(self, parameters: list[Tensor | None]) -> None:
        self._parameters = parameters
        self._tensors = [parameter for parameter in parameters if parameter is not None]

    def _module_attributes(self, name: str, module: nn.Module) -> dict[str, Any]:
        place = f"net.{name}" if name else "net"
        frozen = dict(vars(module))
        for key, value in frozen.items():
            if key in _OF_PARAMETERS and isinstance(module, nn.RNNBase):
                frozen[key] = ANYTHING
            elif key not in _MODULE_ATTRIBUTES:
                frozen[key] = self._frozen(value, f"{place}.{key}", ())
        return frozen

    def _frozen_class(self, cls: type) -> dict[str, Any]:
        frozen = dict(vars(cls))
        for key, value in frozen.items():
            # Methods and properties are compared by identity; the class's own records do not change
            # what it does.
            if not (key.startswith("__") or key == "_abc_impl" or hasattr(type(value), "__get__")):
                frozen[key] = self._frozen(value, f"{cls.__qualname__}.{key}", ())
        return frozen

    def _frozen(self, value: Any, place: str, parents: tuple[int, ...]) -> Any:
        """`_frozen_as_it_is`; a value whose own code raises there cannot be watched."""
        try:
            return self._frozen_as_it_is(value, place, parents)
        except Exception:
            self._unwatched(value, place)
            return value

    def _frozen_as_it_is(self, value: Any, place: str, parents: tuple[int, ...]) -> Any:
        """What equals `value` until it changes: a copy of a container, a stand-in for a tensor."""
        kind = type(value)  # what `__class__` says may be anything
        if issubclass(kind, Tensor):
            return ANY_TENSOR
        if kind is MethodType and _may_be_referred_to(value.__self__):
            return _Method(value)
        if kind is FunctionType and value.__closure__:
            return _Function(value)
        if kind is BuiltinFunctionType and not isinstance(value.__self__, _HAVE_NO_STATE):
            self._unwatched(value, place)
            return value
        if id(value) in parents:
            return value
        if issubclass(kind, (dict, list, tuple, set, frozenset)):
            self._items += len(value)
            if self._items > _MOST_ITEMS or len(parents) > _DEEPEST:
                self._unwatched(value, place)
                return value
        parents = (*parents, id(value))
        if issubclass(kind, dict):
            return {key: self._frozen(item, f"{place}[{key!r}]", parents) for key, item in value.items()}
        if issubclass(kind, (list, tuple)):
            items = [self._frozen(item, f"{place}[{at}]", parents) for at, item in enumerate(value)]
            return items if issubclass(kind, list) else tuple(items)
        if issubclass(kind, (set, frozenset)):
            return set(value)
        if (
            not issubclass(kind, _ATOMS)
            and id(value) not in self._registered
            and id(value) not in self._objects
        ):
            self._watch(value, place, parents)
        return value

    def _watch(self, value: Any, place: str, parents: tuple[int, ...]) -> None:
        """Guard the attributes of an object.

        State in slots, in C, or in a module that torch.fx cannot see is not watched.
        """
        if isinstance(value, (functools.partial, SimpleNamespace)):
            attributes = value.keywords if isinstance(value, functools.partial) else vars(value)
            self._objects[id(value)] = (attributes, self._frozen(attributes, place, parents))
        elif _is_plain(value) and len(self._objects) < _MOST_OBJECTS:
            self._objects[id(value)] = (ref(value), self._frozen(vars(value), place, parents))
        else:
            self._unwatched(value, place)

    def _unwatched(self, value: Any, place: str) -> None:
        kind = type(value)
        self.unwatched.append(f"{place} ({kind.__module__}.{kind.__qualname__})")


class _AnyTensor:
    """Equal to every tensor: values of tensors are not guarded."""

    def __eq__(self, other: object) -> bool:
        return isinstance(other, (Tensor, _AnyTensor))

    __hash__ = None  # type: ignore[assignment]


ANY_TENSOR = _AnyTensor()


class _Anything:
    """Equal to everything: stands for what is watched elsewhere."""

    def __eq__(self, other: object) -> bool:
        return True

    __hash__ = None  # type: ignore[assignment]


ANYTHING = _Anything()


class _Method:
    """Equal to a bound method of the same function and object, without keeping the object alive."""

    def __init__(self, method: MethodType) -> None:
        self.function, self.owner = method.__func__, ref(method.__self__)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, MethodType):
            return False
        return other.__func__ is self.function and other.__self__ is self.owner()

    __hash__ = None  # type: ignore[assignment]


class _Function:
    """Equal to one function, without keeping alive what it holds: often the network."""

    def __init__(self, function: FunctionType) -> None:
        self.function = ref(function)

    def __eq__(self, other: object) -> bool:
        return other is self.function()

    __hash__ = None  # type: ignore[assignment]


class _Plain:
    """As large as any object whose state is in its `__dict__` alone."""


_MOST_OBJECTS = 100
#: Every item is compared at every call, so that more of them would cost more than the capture
#: saves.
_MOST_ITEMS = 100_000
_DEEPEST = 50
#: What a builtin function can be bound to without being able to change: a module, a class, text.
_HAVE_NO_STATE = (type, ModuleType, *_NUMBERS_AND_NAMES)


def _is_plain(value: Any) -> bool:
    kind = type(value)
    sized = kind.__basicsize__ == _Plain.__basicsize__ and not issubclass(kind, (type, *_NUMBERS_AND_NAMES))
    return sized and kind.__dictoffset__ != 0 and kind.__weakrefoffset__ != 0


def _may_be_referred_to(value: Any) -> bool:
    return type(value).__weakrefoffset__ != 0 or isinstance(value, type)


def _watched(live: ref[Any] | dict[str, Any]) -> dict[str, Any]:
    return live if isinstance(live, dict) else vars(live())


def _ties(parameters: list[Tensor | None]) -> list[int]:
    """For each parameter, the first place of its tensor; -1 for None."""
    first: dict[int, int] = {}
    return [-1 if p is None else first.setdefault(id(p), at) for at, p in enumerate(parameters)]


def _user_classes(modules: list[nn.Module]) -> list[type]:
    """The classes, not PyTorch's own, whose attributes the forwards of these modules can read."""
    classes = dict.fromkeys(cls for module in modules for cls in type(module).__mro__)
    return [
        cls
        for cls in classes
        if cls.__module__.partition(".")[0] not in ("torch", "builtins", "abc", "typing")
    ]
