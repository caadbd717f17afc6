"""Which modules of a network compute, at every forward pass on the same input, what they computed
at the first.

Those whose output depends neither on a parameter of a given set nor on a random number, by values
and not by gradients: every function that PyTorch tells a `TorchFunctionMode` of is followed, and
what one of them makes of something that moves moves too, and so does what came from somewhere
unseen. A forward pass that looks at values (`.item()`, `if x.sum() > 0`), keeps something in
attributes, reads the clock or draws from generators that are not PyTorch's is not understood, and
nothing of it is said to stand still.
"""

from __future__ import annotations

import random
import sys
from collections import deque
from collections.abc import Callable, Collection, Iterator, Mapping
from types import ModuleType
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from fastmeta.backends._captured import leaves_behind
from fastmeta.backends._random_state import RandomState, preserved
from fastmeta.bounded import Bounded
from fastmeta.capture.guards import Guard
from fastmeta.inputs import Tree, first_leaf, leaves_of, mapped, signature
from fastmeta.network.functional import call, own
from fastmeta.network.swap import LOCK, Exchange
from fastmeta.undisturbed import asynchronous

#: Functions that tell of a tensor what its values do not matter for.
_ABOUT = frozenset(
    "size dim ndimension numel nelement stride storage_offset is_floating_point is_complex is_contiguous "
    "element_size __len__ get_device __get__ is_signed type __hash__ is_same_size is_inference is_conj "
    "is_neg result_type has_names is_shared is_pinned can_cast is_tensor is_storage broadcast_shapes".split()
)
#: What a forward pass finds exchanged: by us, or by recurrent layers that find their parameters
#: exchanged.
_HELD_ELSEWHERE = ("_parameters", "_buffers", "_modules", "forward", "_flat_weights", "_flat_weight_refs")
#: Functions whose results are as large as the values say.
_SHAPED = frozenset(
    "nonzero argwhere unique unique_consecutive masked_select repeat_interleave bincount".split()
)
#: A network that is another one at every call is not looked at for ever.
_MOST_LOOKS = 16
#: What is remembered of a network as it is, for shapes and adapted parameters.
_MOST_SORTS = 256
_Found = Bounded[object, tuple[str, ...]]


class _Unknown(Exception):
    """The forward pass does what is not followed."""


def still(
    net: nn.Module, params: Mapping[str, Tensor], moving: Collection[str], x: Tree, batch_stats: str
) -> tuple[str, ...]:
    """Names of the largest modules with parameters whose outputs stand still; () also where that is
    not known.

    Looked for once for a network, shapes and parameters, and remembered until the network changes;
    runs one forward pass, and draws nothing from the random state.

    Args:
        net: the network.
        params: one task's parameters, name -> [*shape].
        moving: names of those that change.
        x: one task's input, [N, *in] or a tree.
        batch_stats: as of `call`.
    """
    with LOCK:
        known = _known.setdefault(net, _Known())
        found = known.found(net)
        if found is None:
            return ()
        key = (frozenset(moving), signature(x), batch_stats)
        names = found.get(key)
        if names is None:
            names = found.put(key, _look(net, params, moving, x, batch_stats))
            if names and known.found(net) is not found:  # the forward pass changed something
                give_up(net)
                return ()
        return names


class _Known:
    """What was found of one network, in training and in evaluation and with whatever else its guard
    tells apart."""

    def __init__(self) -> None:
        self.guards: list[tuple[Guard, _Found]] = []
        self.looks = 0

    def found(self, net: nn.Module) -> _Found | None:
        """What is known of it as it is; None: nothing can be."""
        for guard, found in self.guards:
            if guard.holds(net):
                return None if guard.unwatched or guard.hooked or guard.entropy else found
        if self.looks >= _MOST_LOOKS:
            return None
        self.looks += 1
        self.guards.append((Guard(net), Bounded(_MOST_SORTS)))
        return self.found(net)


_known: WeakKeyDictionary[nn.Module, _Known] = WeakKeyDictionary()


def give_up(net: nn.Module) -> None:
    """Say of nothing in this network that it stands still."""
    known = _known.setdefault(net, _Known())
    known.guards, known.looks = [], _MOST_LOOKS


def _look(
    net: nn.Module, params: Mapping[str, Tensor], moving: Collection[str], x: Tree, batch_stats: str
) -> tuple[str, ...]:
    modules = dict(net.named_modules())
    if any(
        "forward" in vars(module) or isinstance(module, torch.jit.ScriptModule) for module in modules.values()
    ):
        return ()
    if any(type(module).__name__ == "OptimizedModule" for module in modules.values()):
        return ()
    device = first_leaf(x).device
    start = RandomState.now(device, net)
    # those that move require grad, so that what no function mode sees, such as C++, shows in the
    # graph
    values = {name: own(value.clone(), requires_grad=name in moving) for name, value in params.items()}
    exchange, x = Exchange(net), mapped(lambda leaf: own(leaf.clone()), x)
    known = [*leaves_of(x), *values.values(), *net.buffers(), *_tensors(_Outside(modules.values()).alive)]
    traced = _Traced(net, modules, [values[name] for name in moving], known, start)
    stubs = {name: traced.stub(name, module) for name, module in modules.items()}
    try:
        with preserved(device, net), traced:
            call(exchange, values, x, batch_stats=batch_stats, forwards=stubs)
            if start.drawn_outside_torch(start.anew()):
                return ()
    except Exception as error:  # what is the user's own comes out of the call itself
        if asynchronous(error) or isinstance(error, torch.OutOfMemoryError):
            raise
        return ()
    return tuple(_largest("", net, traced.stands)) if "" in traced.stands else ()


def _largest(name: str, module: nn.Module, stands: Mapping[str, bool]) -> Iterator[str]:
    """The largest modules below that stand still and have parameters."""
    for key, child in module.named_children():
        inside = f"{name}.{key}" if name else key
        if next(child.parameters(), None) is None:
            continue
        if stands.get(inside, False):
            yield inside
        else:
            yield from _largest(inside, child, stands)


class _Traced(TorchFunctionMode):
    """Follows through one forward pass what moves."""

    def __init__(
        self,
        net: nn.Module,
        modules: Mapping[str, nn.Module],
        moving: Collection[Tensor],
        known: Collection[Tensor],
        state: RandomState,
    ) -> None:
        super().__init__()
        self.net, self.modules = net, modules
        self.stands: dict[str, bool] = {}
        self._state = state
        self._moving = {id(tensor) for tensor in moving}
        self._moves = {_memory(tensor) for tensor in moving}
        self._seen = set(map(_memory, known))  # and of what was made of it
        self._alive: list[Tensor] = []  # so that no address is given out twice

    def stub(self, name: str, module: nn.Module) -> Callable[..., Any]:
        """A forward of one module that looks at what it does."""
        forward = module.forward

        def run(*args: Any, **kwargs: Any) -> Any:
            with torch._C.DisableTorchFunction():
                given = _tensors((args, kwargs)) + self._buffers()
                before, outside = (
                    _versions(given),
                    _Outside(self.modules.values()) if module is self.net else None,
                )
            output = forward(*args, **kwargs)
            with torch._C.DisableTorchFunction():
                if outside is not None and outside.ids != _Outside(self.modules.values()).ids:
                    raise _Unknown("it keeps something")
                still = (
                    _is_plain(output)
                    and before == _versions(given)
                    and self._are_still(_tensors(output), given)
                )
            self.stands[name] = self.stands.get(name, True) and still
            return output

        return run

    def _are_still(self, made: Collection[Tensor], given: Collection[Tensor]) -> bool:
        """Whether what a module made of `given` stands still. What is a view of that does not: a
        copy would be none."""
        memory = {*map(_memory, made)}
        if not memory.isdisjoint(map(_memory, given)) or not memory.isdisjoint(self._moves):
            return False
        return memory <= self._seen and not any(map(self._leads_to_moving, made))

    def _leads_to_moving(self, tensor: Tensor) -> bool:
        return tensor.requires_grad and not self._moving.isdisjoint(map(id, [tensor, *leaves_behind(tensor)]))

    def _buffers(self) -> list[Tensor]:
        """Those that somebody may read: of the batches that a norm has seen nobody does, by
        fastmeta's conventions."""
        return [
            buffer
            for module in self.modules.values()
            for name, buffer in module._buffers.items()
            if buffer is not None and not (name == "num_batches_tracked" and isinstance(module, _NormBase))
        ]

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        given = _tensors((args, kwargs))
        before = _versions(given)
        output = func(*args, **kwargs)
        if given and not _is_plain(output) and getattr(func, "__name__", "") not in _ABOUT:
            raise _Unknown("it looks at values")
        drawn = self._state.anew()
        if drawn.same_as(self._state):
            moves = any(
                _memory(tensor) in self._moves or _memory(tensor) not in self._seen for tensor in given
            )
        else:
            moves, self._state = True, drawn
        if moves and _shaped_by_values(func, args):
            raise _Unknown("a shape depends on values")
        made = _tensors(output)
        self._alive += made
        self._seen.update(map(_memory, made))
        if moves:
            changed = [
                tensor for tensor, version in zip(given, before, strict=True) if tensor._version != version
            ]
            self._moves.update(map(_memory, made + changed))
        return output


def _shaped_by_values(func: Any, args: tuple[Any, ...]) -> bool:
    """Whether the shape of what a function returns depends on values."""
    name = getattr(func, "__name__", "")
    if name == "__getitem__":
        return any(tensor.dtype in (torch.bool, torch.uint8) for tensor in _tensors(args[1:]))
    return name in _SHAPED or (name == "where" and len(args) == 1)


def _tensors(value: Any) -> list[Tensor]:
    """All tensors in nested containers."""
    return [leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor)]


def _memory(tensor: Tensor) -> int:
    """What two tensors have in common if one is a view of the other."""
    return tensor.untyped_storage().data_ptr() or id(tensor)


def _versions(tensors: Collection[Tensor]) -> list[int]:
    return [tensor._version for tensor in tensors]


def _is_plain(output: Any) -> bool:
    """A tensor, or tensors and None in tuples, lists and dicts."""
    leaves = tree_leaves(output)
    return bool(leaves) and all(leaf is None or isinstance(leaf, Tensor) for leaf in leaves)


class _Outside:
    """What a forward pass may leave behind: attributes, and states of other generators than
    PyTorch's."""

    def __init__(self, modules: Collection[nn.Module]) -> None:
        self.ids: list[Any] = [random.getstate()]
        self.alive: list[Any] = []  # so that no id is given out twice
        if (numpy := sys.modules.get("numpy")) is not None:
            kind, keys, *rest = numpy.random.get_state()
            self.ids += [kind, keys.tobytes(), *rest]
        for module in modules:
            for key, value in vars(module).items():
                if key not in _HELD_ELSEWHERE:
                    self._add(value, 2)

    def _add(self, value: Any, depth: int) -> None:
        self.alive.append(value)
        self.ids.append((id(value), value._version if isinstance(value, Tensor) else None))
        if depth == 0 or isinstance(value, (nn.Module, type, ModuleType)):
            return
        if isinstance(value, dict):
            inside = [*value.values()]
        elif isinstance(value, (list, tuple, set, deque)):
            inside = [*value]
        else:
            inside = [*getattr(value, "__dict__", {}).values()]
        self.ids.append(len(inside))
        for item in inside:
            self._add(item, depth - 1)
