"""Capture: an `nn.Module` becomes a layer program, once, and again whenever the module has changed.

Capture is never silently wrong: whatever is not known to mean exactly what a layer means is refused
with a reason, and the network then runs on a backend that calls the module itself.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from typing import Any
from weakref import ref

import torch
from torch import Tensor, fx, nn

from fastmeta.bounded import Bounded
from fastmeta.capture.build import BATCH, Buffer, Builder, Constant, Parameter, Refused, Value, described
from fastmeta.capture.guards import HOOKS, Guard
from fastmeta.capture.kinds import CALLS, MODULES, READ_BUFFERS
from fastmeta.capture.sizes import ARITHMETIC, AUGMENTED
from fastmeta.capture.trace import Root, function_name, traced
from fastmeta.graph.program import Layer, Program

_Result = tuple[Program | None, str]
#: The most captures of one network that are kept (one an input shape), and their bytes in all.
_MOST_CAPTURES, _MOST_BYTES = 256, 8 << 20


class _Captures:
    """What is known of one network: its captures, and the guard that they depend on."""

    def __init__(self, net: nn.Module, known: Bounded[Program, Program]) -> None:
        key = id(net)
        self.net = ref(net, lambda _: _CAPTURES.pop(key, None))
        self.guard = Guard(net)
        self.results: Bounded[Any, _Result] = Bounded(
            _MOST_CAPTURES, _MOST_BYTES, lambda result: _bytes(result[0])
        )
        self.known = known


_CAPTURES: dict[int, _Captures] = {}


def captured(
    net: nn.Module, input_shape: tuple[int, ...], dtype: torch.dtype, batch_stats: str = "task"
) -> _Result:
    """The layer program of a network for one shape of input, or the reason why it has none.

    The same `Program` object is returned until the network changes in a way that changes the
    program. Trained or replaced parameters change nothing, since a program holds their names and
    shapes only.

    Args:
        net: any module; it is not modified.
        input_shape: shape of one example, without batch dimension.
        dtype: of the input, a floating-point type.
        batch_stats: as in `fastmeta.network.functional.call`; it says which norms name their
            running statistics.

    Returns:
        (program, "") or (None, reason).
    """
    captures = _captures_of(net)
    if isinstance(captures, str):
        return None, captures
    key = (input_shape, dtype, batch_stats)
    result = captures.results.get(key)
    if result is None:
        program, reason = _captured(net, captures.guard, tuple(input_shape), dtype, batch_stats)
        if program is not None:
            # Plans are cached by program: an equal one is handed out as the same object.
            program = captures.known.get(program) or captures.known.put(program, program)
        result = captures.results.put(key, (program, reason))
    return result


def guard_of(net: nn.Module) -> Guard | None:
    """The guard of a network as it is: the same object until something that a forward can read has
    changed. None of a network that cannot be watched."""
    captures = _captures_of(net)
    return None if isinstance(captures, str) else captures.guard


def _captures_of(net: nn.Module) -> _Captures | str:
    """What is known of a network, begun anew if it has changed; a string: why nothing can be."""
    captures = _CAPTURES.get(id(net))
    if captures is not None and captures.net() is net and captures.guard.holds(net):
        return captures
    for name, module in net.named_modules():
        if isinstance(module, torch.jit.ScriptModule):
            return f"cannot capture {_place(name, module)}: it is a TorchScript module"
    known = (
        captures.known
        if captures is not None and captures.net() is net
        else Bounded(_MOST_CAPTURES, _MOST_BYTES, _bytes)
    )
    captures = _CAPTURES[id(net)] = _Captures(net, known)
    return captures


def frozen_flags(net: nn.Module) -> tuple[bool, ...]:
    """Which parameters of a network require grad, by module; call it right after `captured`."""
    return _CAPTURES[id(net)].guard.requires_grad()


def _bytes(program: Program | None) -> int:
    """About what a program takes in memory."""
    return 500 if program is None else 1000 + 700 * len(program.layers) + 200 * len(program.params)


def _captured(
    net: nn.Module, guard: Guard, input_shape: tuple[int, ...], dtype: torch.dtype, batch_stats: str
) -> _Result:
    try:
        _check(net, guard, dtype)
        root, graph = traced(net)
        return _program(root, graph, input_shape, dtype, batch_stats), ""
    except Refused as reason:
        return None, str(reason)


def _check(net: nn.Module, guard: Guard, dtype: torch.dtype) -> None:
    """Refuse what tracing would not see."""
    if not dtype.is_floating_point:
        raise Refused(f"cannot capture a network of {dtype} inputs: they are not floating-point")
    for name, module in net.named_modules():
        place = _place(name, module)
        if any(getattr(module, hooks) for hooks in HOOKS):
            raise Refused(f"cannot capture {place}: it has hooks")
        if "parametrizations" in module._modules:
            raise Refused(f"cannot capture {place}: it has parametrizations")
        if "forward" in vars(module):
            raise Refused(f"cannot capture {place}: its forward has been replaced on the instance")
        for parameter in module._parameters.values():
            if parameter is not None and type(parameter) not in (nn.Parameter, Tensor):
                raise Refused(
                    f"cannot capture {place}: it has a parameter of type {type(parameter).__qualname__}"
                )
        for buffer, value in module._buffers.items():
            if value is not None and value.requires_grad:
                raise Refused(f"cannot capture {place}: its buffer `{buffer}` requires grad")
    if guard.hooked:
        raise Refused("cannot capture any network while global module hooks are registered")
    if guard.entropy:
        raise Refused(f"cannot capture a forward that reads the clock or entropy ({guard.entropy[0]})")
    if guard.unwatched:
        raise Refused(f"cannot watch {guard.unwatched[0]} for changes")


def _program(
    root: Root, graph: fx.Graph, input_shape: tuple[int, ...], dtype: torch.dtype, batch_stats: str
) -> Program:
    """Turn the traced operators into layers, one by one."""
    parameters = {id(p): Parameter(name, tuple(p.shape)) for name, p in root.net.named_parameters()}
    buffers = {id(b): Buffer(name, tuple(b.shape)) for name, b in root.net.named_buffers()}
    build = Builder(input_shape, parameters, buffers, dtype, batch_stats)
    results: dict[fx.Node, Any] = {}
    for node in graph.nodes:
        try:
            results[node] = _result(build, root, node, results)
        except Refused as reason:
            why = f": {reason}" if str(reason) else ""
            raise Refused(f"cannot capture {_described_node(root, node)}{why}") from None
    output = results[node]
    layers, index = _without_dead(build.layers, output.index)
    named = {name for layer in layers for name in layer.params}
    return Program(
        input_shape,
        layers,
        index,
        tuple((p.name, p.shape) for p in parameters.values()),
        tuple((b.name, b.shape) for b in buffers.values() if b.name in named),
    )


def _result(build: Builder, root: Root, node: fx.Node, results: dict[fx.Node, Any]) -> Any:
    """What one traced operator returns: a value, a parameter, or a plain number or size."""
    args: Any = fx.node.map_arg(node.args, results.__getitem__)
    kwargs: Any = fx.node.map_arg(node.kwargs, results.__getitem__)
    given = list(_flat((args, tuple(kwargs.values()))))
    for argument in given:
        if isinstance(argument, Value):
            build.check_readable(argument)
        if isinstance(argument, (Constant, Tensor)) and node.target not in READ_BUFFERS:
            raise Refused(f"it reads {described(argument)}")
    if node.op == "placeholder":
        return build.input
    if node.op == "get_attr":
        return _attribute(build, root, str(node.target))
    if node.op == "output":
        if not isinstance(args[0], Value):
            raise Refused(f"the network must return one traced tensor, got {described(args[0])}")
        return args[0]
    if node.op == "call_module":
        module = root.get_submodule(str(node.target))
        if type(module) not in MODULES:
            raise Refused()
        rule, names = MODULES[type(module)]
        attributes = {name: _of_module(build, module, name, str(node.target)) for name in names}
        return _called((rule,), build, args, kwargs | attributes)
    if not any(isinstance(argument, (Value, Parameter)) for argument in given):
        return _evaluated(node.target, args, kwargs)
    if node.target not in CALLS:
        raise Refused()
    return _called(CALLS[node.target], build, args, kwargs)


def _called(rules: Iterable[Any], build: Builder, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    for rule in rules:
        try:
            bound = inspect.signature(rule).bind(build, *args, **kwargs)
        except TypeError as error:
            raise Refused(str(error)) from None
        result = rule(*bound.args, **bound.kwargs)
        if result is not NotImplemented:
            return result
    raise Refused(f"no layer does it to {' and '.join(map(described, args))}")


def _evaluated(function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Arithmetic on sizes and numbers."""
    function = AUGMENTED.get(function, function)
    if function not in ARITHMETIC:
        raise Refused()
    try:
        return function(*args, **kwargs)
    except Exception as error:  # the batch size has no arithmetic; numbers may overflow or divide by zero
        about = "arithmetic on the batch size, " if BATCH in _flat(args) else ""
        raise Refused(f"{about}{error}") from None


def _attribute(build: Builder, root: Root, target: str) -> Parameter | Constant:
    owner, _, name = target.rpartition(".")
    return build.parameter(getattr(root.get_submodule(owner), name), target)


def _of_module(build: Builder, module: nn.Module, name: str, place: str) -> Any:
    value = getattr(module, name)
    return build.parameter(value, f"{place}.{name}") if isinstance(value, Tensor) else value


def _without_dead(layers: list[Layer], output: int) -> tuple[tuple[Layer, ...], int]:
    """The layers that the output depends on, values renumbered."""
    alive = {output}
    for index in range(len(layers), 0, -1):
        if index in alive:
            alive.update(layers[index - 1].inputs)
    number = {value: place for place, value in enumerate(sorted(alive | {0}))}
    kept = [
        Layer(
            old.kind, tuple(number[v] for v in old.inputs), old.shape, old.params, old.function, old.constants
        )
        for index, old in enumerate(layers, start=1)
        if index in alive
    ]
    return tuple(kept), number[output]


def _flat(argument: Any) -> Iterable[Any]:
    if isinstance(argument, (tuple, list)):
        for item in argument:
            yield from _flat(item)
    elif isinstance(argument, dict):
        yield from _flat(tuple(argument.values()))
    elif isinstance(argument, slice):
        yield from _flat((argument.start, argument.stop, argument.step))
    else:
        yield argument


def _described_node(root: Root, node: fx.Node) -> str:
    if node.op == "call_module":
        return f"`{_type_name(root.get_submodule(str(node.target)))}` ({node.target})"
    if node.op == "output":
        return f"the output of `{_type_name(root.net)}`"
    name = f"Tensor.{node.target}" if node.op == "call_method" else function_name(node.target)
    return f"`{name}` (node {node.name}, called in {node.meta.get('place') or 'net'})"


def _place(name: str, module: nn.Module) -> str:
    return f"`{_type_name(module)}` ({f'net.{name}' if name else 'net'})"


def _type_name(module: nn.Module) -> str:
    kind = type(module)
    return f"nn.{kind.__qualname__}" if kind.__module__.startswith("torch.nn.modules") else kind.__qualname__
