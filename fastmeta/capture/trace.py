"""Tracing a network with torch.fx, so that what torch.fx would record wrongly is refused instead.

torch.fx runs the forward once on stand-ins for tensors and records what is done to them. On its own
it overlooks that values of tensors are read as Python numbers, that gradients are switched off,
that an augmented assignment works in place, that attributes are set, types tested or random numbers
drawn.
"""

from __future__ import annotations

import copy
import math
import operator
import pickle
import random
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx import _symbolic_trace as _fx
from torch.overrides import TorchFunctionMode, _get_current_function_mode_stack

from fastmeta.capture.build import Refused
from fastmeta.capture.guards import Guard
from fastmeta.capture.kinds import MODULES
from fastmeta.network.swap import LOCK
from fastmeta.undisturbed import abandon, asynchronous, undisturbed


class Root(nn.Module):
    """Holds the network as `net`, so that its forward is called as a user does, with one tensor."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Any) -> Any:
        return self.net(x)


_METHODS: list[tuple[type, str]] = [
    (nn.Module, "__call__"),
    (nn.Module, "__getattr__"),
    (torch.autograd.Function, "apply"),
    *_fx._wrapped_methods_to_patch,
]


def traced(net: nn.Module) -> tuple[Root, fx.Graph]:
    """What `net` does to one tensor.

    Returns:
        A copy of the network (it shares the parameters) under a `Root`, and the graph over that
        root.

    Raises:
        Refused: the forward cannot be traced, or not faithfully.
    """
    with LOCK:  # torch.fx patches nn.Module for the whole process while it traces: one capture at a time
        return _unpatched(net)


def _unpatched(net: nn.Module) -> tuple[Root, fx.Graph]:
    """`_traced`, and nothing is left patched if it is interrupted."""
    tracer = _Tracer()
    before = _Patched()
    try:
        try:
            return undisturbed(_traced, net, tracer)
        except BaseException as error:
            before.restore(tracer, error)
            raise
    except BaseException as error:  # the first time may have been interrupted itself
        before.restore(tracer, error)
        raise


def _traced(net: nn.Module, tracer: _Tracer) -> tuple[Root, fx.Graph]:
    root = Root(_copied(net))
    guard = Guard(root)
    with (
        _random_draws_refused(),
        _autograd_functions_refused(),
        torch.inference_mode(False),
        torch.enable_grad(),
    ):
        refusing = _RealTensorsRefused()
        tracer.ambient = _ambient()
        try:
            try:
                with refusing:
                    graph = tracer.trace(root)
            finally:
                refusing.gone()
        except Refused as reason:
            raise Refused(
                f"cannot capture `{_class_name(net)}` (in {tracer.place or 'net'}): {reason}"
            ) from None
        except Exception as error:  # the forward is the user's code: on stand-ins it may raise anything
            if asynchronous(error):
                raise
            message = str(error).partition("\n")[0] or type(error).__name__
            raise Refused(
                f"cannot trace `{_class_name(net)}` (in {tracer.place or 'net'}): {message}"
            ) from error
    if not guard.holds(root):
        raise Refused(f"cannot capture `{_class_name(net)}`: its forward sets attributes of its modules")
    return root, graph


class _Stand(fx.Proxy):
    """A stand-in for a tensor or a size in the traced forward."""

    @property  # type: ignore[misc]
    def __class__(self) -> type:
        # isinstance(x, Tensor) would answer False and the forward take the wrong branch; torch
        # itself may ask.
        caller = sys._getframe(1)
        while caller.f_globals.get("__name__") == "abc" and caller.f_back:
            caller = caller.f_back
        asker = caller.f_globals.get("__name__", "").partition(".")[0]
        tests = asker not in _MAY_TEST_TYPES and "isinstance" in caller.f_code.co_names
        if tests or caller.f_code.co_name == "is_tensor":
            raise Refused("it tests the type of a traced value")
        return _Stand

    def __setattr__(self, name: str, value: Any) -> None:
        if name not in ("node", "tracer"):
            raise Refused(f"it sets the attribute `{name}` of a traced value")
        super().__setattr__(name, value)

    def __len__(self) -> int:
        raise Refused("it takes len() of a traced value (use x.shape[0])")

    def __iadd__(self, other: Any) -> Any:
        return self.tracer.create_proxy("call_function", operator.iadd, (self, other), {})

    def __isub__(self, other: Any) -> Any:
        return self.tracer.create_proxy("call_function", operator.isub, (self, other), {})

    def __imul__(self, other: Any) -> Any:
        return self.tracer.create_proxy("call_function", operator.imul, (self, other), {})

    def __itruediv__(self, other: Any) -> Any:
        return self.tracer.create_proxy("call_function", operator.itruediv, (self, other), {})


_MAY_TEST_TYPES = ("torch", "fastmeta")


class _Tracer(fx.Tracer):
    """Stops at modules of known kinds and at PyTorch's own; everything else is traced through."""

    proxy_buffer_attributes = True

    def __init__(self) -> None:
        super().__init__()
        self.place = ""  # where in the network tracing failed
        self.patchers: set[Any] = set()  # what torch.fx has patched
        self.ambient = _ambient()  # gradients and autocast as the trace began
        self._thread = threading.get_ident()

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        own = type(m).__module__.partition(".")[0] == "torch" and type(m) is not nn.Sequential
        return type(m) in MODULES or own

    def call_module(
        self, m: nn.Module, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        if threading.get_ident() != self._thread:  # a module that another thread calls during the trace
            return forward(*args, **kwargs)
        self.patchers.add(getattr(_fx, "CURRENT_PATCHER", None))
        try:
            return super().call_module(m, forward, args, kwargs)
        except BaseException:
            self.place = self.place or self.path_of_module(m)
            raise

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, fx.Proxy]) -> Any:
        if threading.get_ident() != self._thread:
            return attr_val
        return super().getattr(attr, attr_val, parameter_proxy_cache)

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _Stand(node, self)

    def to_bool(self, obj: fx.Proxy) -> bool:
        raise Refused("its control flow depends on a traced value")

    def iter(self, obj: fx.Proxy) -> Iterator[Any]:
        raise Refused("it iterates over a traced value")

    def create_node(self, *args: Any, **kwargs: Any) -> fx.Node:
        if _ambient() != self.ambient:
            raise Refused("it switches gradients or autocast on or off")
        node = super().create_node(*args, **kwargs)
        node.meta["place"] = self.scope.module_path
        return node


class _Patched:
    """What tracing patches in the whole process, as it was before: undoes an interrupted trace."""

    def __init__(self) -> None:
        self.methods = [(cls, name, vars(cls)[name]) for cls, name in _METHODS if name in vars(cls)]
        spaces = [(vars(math), name) for name in vars(math)]
        spaces += [(space, name) for (_, name), space in _fx._wrapped_fns_to_patch.items() if name in space]
        self.entries = [(space, name, space[name]) for space, name in spaces]
        self.flags = [(name, getattr(_fx, name, None)) for name in ("_is_fx_tracing_flag", "CURRENT_PATCHER")]
        numpy = sys.modules.get("numpy")
        self.random = random.getstate()
        self.numpy = numpy.random.get_state() if numpy else None

    def restore(self, tracer: _Tracer, error: BaseException) -> None:
        """Make it what it was; may be done twice."""
        abandon(error)
        for patcher in tracer.patchers - {None}:  # of names in the modules that the user's classes are from
            for patch in reversed(patcher.patches_made):
                if (
                    getattr(patch.frame_dict, "get", None)
                    and patch.frame_dict.get(patch.fn_name) is patch.new_fn
                ):
                    patch.revert()
        for owner, name, value in self.methods:
            if vars(owner)[name] is not value:
                setattr(owner, name, value)
        for space, name, value in self.entries:
            if space[name] is not value:
                space[name] = value
        for name, value in self.flags:
            setattr(_fx, name, value)
        random.setstate(self.random)
        if self.numpy is not None:
            sys.modules["numpy"].random.set_state(self.numpy)


class _RealTensorsRefused(TorchFunctionMode):
    """Refuses what is computed without the traced input: it would become a constant."""

    def gone(self) -> None:
        """Leave the mode if leaving it was interrupted: nothing else could be put back."""
        while self in _get_current_function_mode_stack():
            torch._C._pop_torch_function_stack()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        stands: list[fx.Proxy] = []
        fx.node.map_aggregate((args, kwargs), lambda a: stands.append(a) if isinstance(a, fx.Proxy) else None)
        if not stands:
            raise Refused(f"it calls `{function_name(func)}` on nothing that is traced")
        return func(*args, **kwargs)


def function_name(function: Any) -> str:
    """A function as a refusal names it, e.g. "torch.cumsum"."""
    module = (getattr(function, "__module__", None) or "torch").replace("torch._C._nn", "torch.nn.functional")
    return f"{module.removeprefix('_')}.{getattr(function, '__name__', repr(function))}"


def _class_name(net: nn.Module) -> str:
    return type(net).__qualname__


def _copied(net: nn.Module) -> nn.Module:
    """A copy of the modules with the same tensors, so that a forward sets attributes only here."""
    tensors = [*net.parameters(), *net.buffers()]
    tensors += [
        value for module in net.modules() for value in vars(module).values() if isinstance(value, Tensor)
    ]
    try:
        return copy.deepcopy(net, {id(tensor): tensor for tensor in tensors})
    except Exception as error:  # attributes of any type are copied here
        if asynchronous(error):
            raise
        raise Refused(f"cannot copy `{_class_name(net)}`: {error}") from error


def _ambient() -> tuple[bool, ...]:
    autocast = (torch.is_autocast_enabled("cpu"), torch.is_autocast_enabled("cuda"))
    return (torch.is_grad_enabled(), torch.is_inference_mode_enabled(), *autocast)


@contextmanager
def _autograd_functions_refused() -> Iterator[None]:
    """Refuses the user's `torch.autograd.Function`s: tracing sees only their forward."""
    original = vars(torch.autograd.Function)["apply"]

    def apply(cls: Any, *args: Any, **kwargs: Any) -> Any:
        if any(isinstance(argument, fx.Proxy) for argument in (*args, *kwargs.values())):
            raise Refused(f"it calls the autograd function `{cls.__qualname__}`")
        return original.__get__(None, cls)(*args, **kwargs)

    torch.autograd.Function.apply = classmethod(apply)  # type: ignore[method-assign,assignment]
    try:
        yield
    finally:
        torch.autograd.Function.apply = original  # type: ignore[method-assign]


@contextmanager
def _random_draws_refused() -> Iterator[None]:
    """Refuses draws from the global generators of Python and NumPy, and restores their states."""
    numpy = sys.modules.get("numpy")
    state, numpy_state = random.getstate(), pickle.dumps(numpy.random.get_state()) if numpy else b""
    drawn = False
    try:
        yield
    finally:
        drawn = random.getstate() != state
        random.setstate(state)
        if numpy:
            drawn |= pickle.dumps(numpy.random.get_state()) != numpy_state
            numpy.random.set_state(pickle.loads(numpy_state))
    if drawn:
        raise Refused("cannot capture a forward that draws random numbers")
