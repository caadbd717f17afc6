"""After every public call, also one that raised, modules and torch's global state are what they
were before.

`conftest.py` has every test run inside `watched`, which wraps the public functions: each call notes
the entries of every submodule's `__dict__`, parameters, buffers, submodules and hooks by identity,
and torch's global state, and
compares. What is meant to change something is not wrapped: `fm.flatten`, `load_state_dict`, and
`.backward()`, which fills `.grad`.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.parameter import is_lazy

import fastmeta as fm
from fastmeta import heads, ops
from fastmeta.algorithms.inner_loop import InnerLoop
from fastmeta.network.swap import LOCK

_OPERATORS = ("inner_sgd", "meta_gradient", "task_forward", "task_gradient")
_METHODS = ("forward", "adapt", "predict", "explain")
_ALGORITHMS = (fm.MAML, fm.CAVIA, fm.Reptile, fm.IMAML, fm.MAMLPlusPlus, fm.MetaCurvature, InnerLoop)
_HEADS = ("logistic", "prototypes", "ridge")
_C: Any = torch._C
#: Containers in containers that are looked into.
_DEEPEST = 20


def global_state() -> dict[str, Any]:
    """torch's state that a call could leave changed, of this thread and of the process, and what
    torch.fx patches."""
    functorch, autograd = _C._functorch, _C._autograd
    tracing = fx._symbolic_trace
    devices = ("cpu", "cuda")
    return {
        "gradients": torch.is_grad_enabled(),
        "inference mode": torch.is_inference_mode_enabled(),
        "autocast": [(torch.is_autocast_enabled(d), torch.get_autocast_dtype(d)) for d in devices],
        "autocast nesting": (torch.autocast_increment_nesting(), torch.autocast_decrement_nesting()),
        "function modes": [_C._get_function_stack_at(at) for at in range(_C._len_torch_function_stack())],
        "dispatch modes": _C._len_torch_dispatch_stack(),
        "torch.func": functorch.get_dynamic_layer_stack_depth(),
        "saved-tensor hooks": autograd._top_saved_tensors_default_hooks(True),
        "saved-tensor hooks allowed": autograd._saved_tensors_hooks_get_disabled_error_message(),
        "default dtype": torch.get_default_dtype(),
        "default device": torch.get_default_device(),
        "anomaly mode": (torch.is_anomaly_enabled(), torch.is_anomaly_check_nan_enabled()),
        "deterministic": (torch.are_deterministic_algorithms_enabled(), torch.get_deterministic_debug_mode()),
        "attention": [read() for read in _ATTENTION],
        "cudnn": [getattr(torch.backends.cudnn, flag) for flag in ("enabled", "benchmark", "deterministic")],
        "precision": torch.get_float32_matmul_precision(),
        "threads": torch.get_num_threads(),
        "nn.Module": [id(vars(nn.Module)[name]) for name in ("__call__", "__getattr__", "__setattr__")],
        "autograd.Function": id(vars(torch.autograd.Function)["apply"]),
        "module hooks": [len(hooks) for hooks in _GLOBAL_HOOKS],
        "torch.fx": (tracing._is_fx_tracing_flag, getattr(tracing, "CURRENT_PATCHER", None)),
        "math": id(math.sqrt),
    }


_ATTENTION = [
    getattr(torch.backends.cuda, f"{kind}_sdp_enabled")
    for kind in ("flash", "mem_efficient", "math", "cudnn")
]
_GLOBAL_HOOKS = [
    value
    for name, value in vars(nn.modules.module).items()
    if name.startswith("_global_") and name.endswith("_hooks") and isinstance(value, dict)
]


def module_state(net: nn.Module) -> dict[str, Any]:
    """Everything that a module and its submodules hold, by identity; what containers in attributes
    hold as well."""
    found: dict[str, Any] = {}
    seen: dict[int, nn.Module] = {}
    pending = [("net", net)]
    for name, module in pending:  # grows
        if id(module) in seen:
            continue
        seen[id(module)] = module
        for key, value in vars(module).items():
            found[f"{name}.{key}"] = (id(value), _content(value))
        pending += [(f"{name}.{key}", child) for key, child in module._modules.items() if child is not None]
    found["order"] = [*found]
    return found


def _content(value: Any, parents: tuple[int, ...] = ()) -> Any:
    """What a tensor's version or a container's items are; the class is asked of `type`, which no
    object can fake."""
    kind = type(value)
    if issubclass(kind, Tensor):
        return None if is_lazy(value) or value.is_inference() else value._version
    if id(value) in parents or len(parents) == _DEEPEST:
        return None
    parents = (*parents, id(value))
    if issubclass(kind, dict):
        return [(id(key), id(item), _content(item, parents)) for key, item in dict.items(value)]
    if issubclass(kind, (list, tuple)):
        return [(id(item), _content(item, parents)) for item in value]
    return {id(item) for item in value} if issubclass(kind, set) else None


def differences(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    """The names of what differs."""
    return [name for name in {**before, **after} if before.get(name) != after.get(name)]


def checked(function: Callable[..., Any], name: str) -> Callable[..., Any]:
    """`function`, after each call of which, in whatever way it ends, nothing is changed."""

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():
            return function(*args, **kwargs)
        modules = [argument for argument in (*args, *kwargs.values()) if isinstance(argument, nn.Module)]
        nets = [_net(module) for module in modules if not isinstance(module, torch.jit.ScriptModule)]
        with LOCK:  # another thread may be running the same network
            nets_before, before = [*map(module_state, nets)], global_state()
        try:
            return function(*args, **kwargs)
        finally:
            with LOCK:
                changed = differences(before, global_state())
                for net, was in zip(nets, nets_before, strict=True):
                    changed += differences(was, module_state(net))
            assert not changed, f"{name} has changed {', '.join(changed)}"

    call.watched = True  # type: ignore[attr-defined]
    return call


def _net(module: nn.Module) -> nn.Module:
    """The network of an algorithm, whose own tables and numbers are its own business."""
    net = vars(module).get("_modules", {}).get("net")
    return net if isinstance(module, _ALGORITHMS) and isinstance(net, nn.Module) else module


@contextmanager
def watched() -> Iterator[None]:
    """Wraps every public function for the time of the block."""
    places: list[tuple[Any, str]] = [(fm, name) for name in _OPERATORS]
    places += [(ops, name) for name in _OPERATORS if hasattr(ops, name)]
    places += [(heads, name) for name in _HEADS]
    classes = {
        cls for algorithm in _ALGORITHMS for cls in algorithm.__mro__ if cls.__module__.startswith("fastmeta")
    }
    places += [(cls, name) for cls in classes for name in _METHODS if name in vars(cls)]
    originals = [(owner, name, vars(owner)[name]) for owner, name in places]
    for owner, name, function in originals:
        setattr(owner, name, checked(function, f"{getattr(owner, '__name__', owner)}.{name}"))
    try:
        yield
    finally:
        for owner, name, function in originals:
            setattr(owner, name, function)
