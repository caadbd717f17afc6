"""A module with other tensors in the place of its own for the time of a forward pass, and nothing
left behind.

Everything that a forward pass can set is noted before it runs and put back after it, by identity:
parameters, buffers, submodules and plain attributes of every module, and what lists, dicts, sets
and objects among the attributes hold. Tensors that it could write into it gets as copies. What
undoes a change is built before the change is made, and all old values come back in one call of C
code, which no signal and no other thread cuts in two.
"""

from __future__ import annotations

import os
import threading
from collections import OrderedDict, deque
from collections.abc import Callable, Mapping
from enum import Enum
from functools import wraps
from itertools import chain
from types import BuiltinFunctionType, FunctionType, MethodType, ModuleType, SimpleNamespace
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor, nn

from fastmeta.network.outside import is_library

#: What every module has: hooks, and what is held in a way of its own.
_OF_EVERY_MODULE = frozenset(vars(nn.Module()))
_ATOMS = (
    type(None),
    bool,
    int,
    float,
    complex,
    str,
    bytes,
    range,
    slice,
    torch.dtype,
    torch.device,
    torch.Size,
)
_ATOM_TYPES = frozenset(_ATOMS)
_NO_STATE = (*_ATOMS, type, FunctionType, BuiltinFunctionType, MethodType, ModuleType, Enum)
_ORDINARY = (Tensor, nn.Parameter, nn.Buffer)
_WRAPPERS = (nn.DataParallel, nn.parallel.DistributedDataParallel)
_ALL = slice(None)
#: Containers in containers that are looked into.
_DEEPEST = 50
T = TypeVar("T")
P = ParamSpec("P")
_run_through = deque[Any](maxlen=0).extend

#: The exchanged tensors are there for every thread to see: whoever reads a module's parameters
#: takes this lock.
LOCK = threading.RLock()
# A process forks while no thread holds it: the child has none of the threads that could give it
# back.
if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=LOCK.acquire, after_in_parent=LOCK.release, after_in_child=LOCK.release)


def locked(function: Callable[P, T]) -> Callable[P, T]:
    """`function`, holding `LOCK`: it reads the parameters of a network that another thread may be
    running."""

    @wraps(function)
    def holding(*args: P.args, **kwargs: P.kwargs) -> T:
        with LOCK:
            return function(*args, **kwargs)

    return holding


class Carried:
    """What a module's state has become for one task, handed from one forward pass to the next."""

    def __init__(self) -> None:
        #: Of every container of an `Exchange`, with the module's own tensors where others stand;
        #: None before the first.
        self.contents: list[Any] | None = None
        #: The task's own tensors in the place of those that can be written into: by the ids of
        #: those.
        self.copies: dict[int, Tensor] = {}


class Exchange:
    """A module to be run with other tensors; to be made anew whenever the module may have changed.

    Args:
        net: any module. It is held alive.

    Raises:
        TypeError: the module cannot be run so.
    """

    def __init__(self, net: nn.Module) -> None:
        self.net = net
        #: Everything that can be changed in place, a name for it, and what it holds.
        self.containers: list[Any] = []
        self.places: list[str] = []
        self.old: list[Any] = []
        #: Tensors that could be written into, and tuples that hold something exchanged, by their
        #: ids.
        self._copied: dict[int, Tensor] = {}
        self._tuples: dict[int, Any] = {}
        #: Where a container holds something exchanged: (container, what it holds, [key]).
        self._exchanged: list[tuple[Any, Any, list[Any]]] = []
        self._seen: dict[int, Any] = {id(net): net}
        self._modules = [("net", net)]
        self._depth = 0
        #: id of a container of buffers -> whether a norm holds it.
        self.buffers: dict[int, bool] = {}
        with LOCK:
            #: name, as in `net.named_parameters()` -> id of the parameter.
            self.own = {name: id(value) for name, value in net.named_parameters()}
            self._parameters = {id(value): value for value in net.parameters()}
            for place, module in self._modules:  # grows
                self._hold_module(place, module)
        plain = [
            at
            for at, c in enumerate(self.containers)
            if isinstance(c, dict) and not isinstance(c, OrderedDict)
        ]
        self._dicts, self._old_dicts = [self.containers[at] for at in plain], [self.old[at] for at in plain]
        self._old_keys = [*map(list, self._old_dicts)]
        self._others = [
            pair for at, pair in enumerate(zip(self.containers, self.old, strict=True)) if at not in plain
        ]

    def run(
        self,
        params: Mapping[str, Tensor],
        function: Callable[[], T],
        carried: Carried | None = None,
        then: Callable[[T], None] | None = None,
    ) -> T:
        """`function()` with `params` in the place of the module's parameters.

        Args:
            params: name, as in `net.named_parameters()`, -> tensor. Wherever the module keeps the
                parameter of that name, in several modules or in a list of its own, this tensor is
                found.
            function: runs the module, or something else that may look at it.
            carried: the state that an earlier pass left, which this one starts from and leaves its
                own in; None: the module's own state.
            then: called with the answer when the module has its own parameters again, but still
                what the function has left in buffers and attributes.
        """
        with LOCK:
            return self._run(self._stand_ins(params, carried), function, carried, then)

    def _run(
        self,
        new: dict[int, Any],
        function: Callable[[], T],
        carried: Carried | None,
        then: Callable[[T], None] | None,
    ) -> T:
        try:
            try:
                self._exchange(new, carried)
                output = function()
                if carried is not None:
                    carried.contents = self._contents(new)
                if then is not None:
                    self._put_parameters_back(new)
                    then(output)
                return output
            finally:
                self.put_back()
        except BaseException:
            self.put_back()  # the first time may have been interrupted itself
            raise

    def _put_parameters_back(self, new: dict[int, Any]) -> None:
        """The module's own parameters where those stand that were put in their place."""
        for container, old, keys in self._exchanged:
            for key in keys:
                at = id(old[key])
                parameter = at in new and (at in self._parameters or at in self._tuples)
                if parameter and _holds(container, key, new[at]):
                    container[key] = old[key]

    def put_back(self) -> None:
        """Make the module what it was; may be done twice."""
        _run_through(map(dict.update, self._dicts, self._old_dicts))
        if [*map(list, self._dicts)] != self._old_keys:
            for container, old in zip(self._dicts, self._old_dicts, strict=True):
                if [*container] != [*old]:
                    _refill(container, old)
        for container, old in self._others:
            _refill(container, old)

    def _stand_ins(self, params: Mapping[str, Tensor], carried: Carried | None) -> dict[int, Any]:
        """What stands in the place of an object, by the id of that."""
        new: dict[int, Any] = {self.own[name]: value for name, value in params.items()}
        copies = {} if carried is None else carried.copies
        if not copies:
            copies.update({at: tensor.clone() for at, tensor in self._copied.items()})
        new.update(copies)
        for at, value in self._tuples.items():
            items = [new.get(id(item), item) for item in value]
            new[at] = type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
        return new

    def _exchange(self, new: dict[int, Any], carried: Carried | None) -> None:
        if carried is not None and carried.contents is not None:
            for container, content in zip(self.containers, carried.contents, strict=True):
                _refill(container, _mapped(content, new))
            return
        for container, old, keys in self._exchanged:
            for key in keys:
                at = id(old[key])
                if at in new:
                    container[key] = new[at]

    def _contents(self, new: dict[int, Any]) -> list[Any]:
        """What all containers hold, with the module's own objects in the place of those that stand
        in for them."""
        originals = {id(value): at for at, value in new.items()}
        objects = {**self._tuples, **self._copied, **self._parameters}
        contents = []
        for container, old in zip(self.containers, self.old, strict=True):
            content = _copy(container)
            if not isinstance(content, set):
                for key, value in _items(content):
                    if id(value) in originals:
                        # two parameters may have been given one tensor
                        before = (
                            old.get(key) if isinstance(old, dict) else old[key] if key < len(old) else None
                        )
                        content[key] = (
                            before if new.get(id(before)) is value else objects[originals[id(value)]]
                        )
            contents.append(content)
        return contents

    def _hold(self, place: str, container: Any, keys: list[Any]) -> None:
        self.containers.append(container)
        self.places.append(place)
        old = _copy(container)
        self.old.append(old)
        if keys:
            self._exchanged.append((container, old, keys))

    def _hold_module(self, place: str, module: nn.Module) -> None:
        if isinstance(module, torch.jit.ScriptModule):
            raise TypeError(
                f"{place} is a TorchScript module, whose parameters cannot be exchanged for those of a task: "
                "give the nn.Module that it was made from"
            )
        if isinstance(module, _WRAPPERS):
            raise TypeError(
                f"{place} is wrapped in {type(module).__name__}: give the network itself, its `.module`"
            )
        attributes = vars(module)
        keys = [
            key
            for key, value in attributes.items()
            if type(value) not in _ATOM_TYPES
            and key not in _OF_EVERY_MODULE
            and self._visit(f"{place}.{key}", value, objects=True)
        ]
        self._hold(place, attributes, keys)
        parameters = module._parameters
        self._hold(
            f"{place}'s parameters",
            parameters,
            [k for k, p in parameters.items() if id(p) in self._parameters],
        )
        buffers = {key: buffer for key, buffer in module._buffers.items() if buffer is not None}
        self._copied.update(
            {id(buffer): buffer for buffer in buffers.values() if id(buffer) not in self._parameters}
        )
        self._hold(f"{place}'s buffers", module._buffers, [*buffers])
        self.buffers[id(module._buffers)] = isinstance(module, nn.modules.batchnorm._NormBase)
        self._hold(f"{place}'s modules", module._modules, [])
        for key, child in module._modules.items():
            if child is not None:
                self._add_module(f"{place}.{key}", child)

    def _add_module(self, place: str, module: nn.Module) -> None:
        if id(module) not in self._seen:
            self._seen[id(module)] = module
            self._modules.append((place, module))

    def _visit(self, place: str, value: Any, objects: bool) -> bool:
        """Whether something else is to stand where `value` stands; holds what can be changed in
        place."""
        kind = type(value)  # what `__class__` says may be anything, or raise
        if kind in _ATOM_TYPES:
            return False
        if id(value) in self._parameters:
            return True
        if issubclass(kind, Tensor):
            if (
                kind not in _ORDINARY or value.requires_grad
            ):  # a leaf is not written into, and gradients are to reach it
                return False
            self._copied[id(value)] = value
            return True
        if issubclass(kind, nn.Module):
            self._add_module(place, value)
        elif self._depth == _DEEPEST:
            return False
        elif issubclass(kind, tuple):
            self._depth += 1
            exchanged = [self._visit(place, item, objects) for item in value]  # all of them are held
            self._depth -= 1
            if any(exchanged):
                self._tuples.pop(id(value), None)  # behind those that it holds
                self._tuples[id(value)] = value
                return True
        elif id(value) not in self._seen:
            self._seen[id(value)] = value
            self._depth += 1
            if issubclass(kind, (dict, list, set, deque)):
                self._hold_container(place, value, objects)
            elif objects and (state := _state(value)) is not None:
                self._hold_container(place, state, objects=False)
            self._depth -= 1
        return False

    def _hold_container(self, place: str, container: Any, objects: bool) -> None:
        values = container.values() if isinstance(container, dict) else container
        if isinstance(container, set) or _ATOM_TYPES.issuperset(map(type, values)):
            self._hold(place, container, [])
        else:
            keys = [
                key for key, value in _items(container) if self._visit(f"{place}[{key!r}]", value, objects)
            ]
            self._hold(place, container, keys)


def _state(value: Any) -> dict[str, Any] | None:
    """The attributes that a forward pass may set of an attribute that is an object of the user's;
    None: of no such."""
    kind = type(value)
    if not issubclass(kind, SimpleNamespace) and (issubclass(kind, _NO_STATE) or is_library(kind.__module__)):
        return None
    try:
        state = object.__getattribute__(value, "__dict__")
    except AttributeError:  # it has slots
        return None
    return state if isinstance(state, dict) else None


def _holds(container: Any, key: Any, value: Any) -> bool:
    if isinstance(container, dict):
        return container.get(key) is value
    return key < len(container) and container[key] is value


def _items(container: Any) -> list[tuple[Any, Any]]:
    return [*(container.items() if isinstance(container, dict) else enumerate(container))]


def _copy(container: Any) -> Any:
    """What it holds, in a plain container: a subclass may not be as easily made."""
    kind = dict if isinstance(container, dict) else set if isinstance(container, set) else list
    return kind(container)


def _mapped(content: Any, new: Mapping[int, Any]) -> Any:
    """A copy of what a container held, with other objects in the place of those in `new`."""
    content = _copy(content)
    if not isinstance(content, set):
        for key, value in _items(content):
            if id(value) in new:
                content[key] = new[id(value)]
    return content


def _refill(container: Any, content: Any) -> None:
    """Have a container hold this alone, dicts in this order."""
    if isinstance(container, list):
        list.__setitem__(container, _ALL, content)
        return
    kind: Any = next(kind for kind in (OrderedDict, dict, set, deque) if isinstance(container, kind))
    fill = deque.extend if kind is deque else kind.update
    _run_through(chain(map(kind.clear, [container]), map(fill, [container], [content])))
