"""A rule of the user's own: any function, or a network, which is then a learned optimiser."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from fastmeta.inputs import NotATreeError, flatten, leaves_of
from fastmeta.network.swap import LOCK
from fastmeta.update_rules.rule import Named, Number, State, UpdateRule

#: (theta, gradient, state) -> (theta', state').
Function = Callable[[Named, Named, State], tuple[Named, State]]


class CustomRule(UpdateRule):
    """Any function as the inner step of one task.

        class Scale(nn.Module):                       # a learned optimiser
            def __init__(self):
                super().__init__()
                self.size = nn.Parameter(torch.tensor(0.1))

            def init(self, theta):                    # the state before the first step
                return {name: torch.zeros_like(value) for name, value in theta.items()}

            def forward(self, theta, gradient, state):
                state = {name: 0.9 * state[name] + gradient[name] for name in theta}
                return {name: theta[name] - self.size * state[name] for name in theta}, state

        rule = fm.CustomRule(Scale())
        maml = fm.MAML(net, loss="mse", inner_lr=1.0, inner_steps=5, update_rule=rule)

    The learning rate scales the step that the function makes: theta + alpha (theta' - theta). With
    a rate of 1 the step is the function's own.

    Args:
        function: (theta, gradient, state) -> (theta', state'), of one task: theta and gradient are
            dicts name -> [*shape] of the adapted parameters, state is a tree of tensors. It must
            return new tensors, and modify none of these in place. It may run
            under `torch.func.vmap`, and is run in a loop over tasks where that does not work. The
            parameters of an `nn.Module` get gradients. It may read no other tensor that requires
            grad.
        init: theta -> the state before the first step, a tree of tensors; None: `function.init`, or
            where that is not there no state, ().

    Raises:
        TypeError: `function` or `init` cannot be called, or cannot be a key.
        ValueError: a parameter of the module has no shape yet.
    """

    kind = "custom"
    __slots__ = ("function", "start")

    function: Function
    start: Callable[[Named], State] | None

    def __init__(self, function: Function, init: Callable[[Named], State] | None = None) -> None:
        if isinstance(function, type):
            raise TypeError(
                f"CustomRule: `function` must be an instance, got the class {function.__name__}: write "
                f"{function.__name__}()"
            )
        start = getattr(function, "init", None) if init is None else init
        for name, value in (("function", function), ("init", start)):
            if value is not None and not callable(value):
                raise TypeError(f"CustomRule: `{name}` must be callable, got {type(value).__name__}")
        if function is None:
            raise TypeError("CustomRule: `function` must be callable, got NoneType")
        if isinstance(function, nn.Module):
            lazy = [name for name, value in function.named_parameters() if is_lazy(value)]
            if lazy:
                raise ValueError(
                    f"CustomRule: `function` must be initialised, {lazy[0]!r} has no shape yet: call it once "
                    "before"
                )
        object.__setattr__(self, "function", function)
        object.__setattr__(self, "start", start)
        try:
            self._fill({"function": function, "init": init}, {}, (), {}, {"function": function, "init": init})
        except TypeError as error:
            raise TypeError(
                f"CustomRule: `function` and `init` must be hashable, got {function!r} and {init!r}; wrap "
                "them in functions"
            ) from error
        object.__setattr__(self, "learns", bool(self.values))

    @property
    def module(self) -> nn.Module | None:
        """The module whose parameters are learned."""
        return self.function if isinstance(self.function, nn.Module) else None

    @property
    def values(self) -> dict[str, Tensor]:
        """The parameters of the module by name, as they are now."""
        module = self.module
        return {} if module is None else dict(module.named_parameters())

    @property
    def state(self) -> tuple[str, ...]:
        """Not known before a step."""
        return ()

    @property
    def has_state(self) -> bool:
        """Whether there is anything that makes one."""
        return self.start is not None

    @property
    def elementwise(self) -> bool:
        """Not known."""
        return False

    def init(self, theta: Named) -> State:
        """As `UpdateRule.init`.

        Raises:
            TypeError: what comes is no tree of tensors.
        """
        if self.start is None:
            return ()
        return _tree("`init`", _unmodified("`init`", [*theta.values()], self.start, dict(theta)))

    def at_step(self, hyper: Mapping[str, Tensor], k: int) -> dict[str, Number]:
        """The parameters, which are the same at every step."""
        return dict(hyper)

    def step(
        self, theta: Named, gradient: Named, state: State, rates: Named, hyper: Mapping[str, Number], k: int
    ) -> tuple[Named, State]:
        """As `UpdateRule.step`.

        Raises:
            TypeError, ValueError: what the function returns does not fit.
        """
        given = [*theta.values(), *gradient.values(), *leaves_of(state)]
        numbers = cast("dict[str, Tensor]", dict(hyper))
        found = _unmodified(
            "the function", given, self._called, (dict(theta), dict(gradient), state), numbers
        )
        if not isinstance(found, tuple) or len(found) != 2 or not isinstance(found[0], Mapping):
            raise TypeError(
                "CustomRule: the function must return (theta, state), theta a dict of tensors, got "
                f"{type(found).__name__}"
            )
        moved, after = found
        for name, value in theta.items():
            new = moved.get(name)
            if not isinstance(new, Tensor) or new.shape != value.shape or new.dtype != value.dtype:
                got = f"{tuple(new.shape)} {new.dtype}" if isinstance(new, Tensor) else type(new).__name__
                raise ValueError(
                    f"CustomRule: the function must return theta[{name!r}] as {tuple(value.shape)} "
                    f"{value.dtype}, got {got}"
                )
        before, then = flatten(state)[1], flatten(_tree("the function", after))[1]
        if then.without_constants() != before.without_constants():
            raise ValueError("CustomRule: the function must return a state of the same form as it was given")
        return {name: value + rates[name] * (moved[name] - value) for name, value in theta.items()}, after

    def _called(self, given: tuple[Any, ...], hyper: dict[str, Tensor]) -> Any:
        if self.module is None:
            return self.function(*given)
        with LOCK:  # its parameters are exchanged meanwhile
            return torch.func.functional_call(self.module, hyper, given)

    def move(self, *given: Any) -> tuple[Tensor, Named]:
        """There is no step of one parameter alone."""
        raise NotImplementedError


#: What autograd says where an argument is modified.
_IN_PLACE = re.compile(
    "leaf Variable that requires grad is being used in an in-place|is being modified inplace"
)


def _unmodified(what: str, given: Sequence[Tensor], function: Callable[..., Any], *args: Any) -> Any:
    """What the function returns.

    Raises:
        ValueError: it modifies a tensor that it was given.
    """
    message = (
        f"CustomRule: {what} must not modify theta, the gradient or the state in place: return new tensors"
    )
    versions = [*map(_version, given)]
    try:
        found = function(*args)
    except RuntimeError as error:
        if _IN_PLACE.search(str(error)):
            raise ValueError(message) from error
        raise
    if versions != [*map(_version, given)]:
        raise ValueError(message)
    return found


def _version(tensor: Tensor) -> int:
    """A number that every modification in place makes larger."""
    return 0 if tensor.is_inference() else tensor._version


def _tree(what: str, tree: Any) -> State:
    try:
        flatten(tree)
    except NotATreeError as error:
        raise TypeError(f"CustomRule: the state that {what} returns must hold tensors: {error}") from None
    return tree
