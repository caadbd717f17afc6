"""The state of everything that a network on one device can draw random numbers from.

That is torch's generators, the global ones of Python and NumPy, and the generator objects that its
code holds. The clock, the operating system's entropy and iterators have no state to be replayed:
`fingerprint.py` notices those.
"""

from __future__ import annotations

import pickle
import random
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fastmeta.network.generators import generators_of
from fastmeta.problem import Problem


@dataclass(frozen=True, slots=True)
class RandomState:
    """A snapshot of the generators of the CPU, of one device, of Python and NumPy, and of the
    user's own objects."""

    device: torch.device
    generators: tuple[Any, ...]  # the user's own
    cpu: Tensor
    accelerator: Tensor | None  # None: the device is the CPU
    python: tuple[Any, ...]
    numpy: Any  # None: nobody has imported `numpy.random`
    own: tuple[Any, ...]  # of `generators`

    @classmethod
    def now(
        cls,
        device: torch.device,
        net: nn.Module | None = None,
        *functions: Callable[..., Any] | None,
    ) -> RandomState:
        """The state as it is.

        Args:
            device: of the tensors.
            net, functions: where to look for generator objects.
        """
        return _snapshot(device, generators_of(net, functions))

    @classmethod
    def of(cls, problem: Problem) -> RandomState:
        """The state of all that the network, the losses and the update rule of `problem` can draw
        from."""
        device = next(iter(problem.params.values())).device
        losses = (problem.loss, problem.query_loss)
        functions = [loss.function for loss in losses if loss is not None]
        rule = problem.rule
        if rule is not None and rule.kind == "custom":
            functions += [rule.function, rule.start]  # type: ignore[attr-defined]
        return cls.now(device, problem.net, *functions)

    def anew(self) -> RandomState:
        """The state of the same generators as it is now."""
        return _snapshot(self.device, self.generators)

    def restore(self) -> None:
        """Make the state what it was."""
        torch.set_rng_state(self.cpu)
        if self.accelerator is not None:
            _module(self.device).set_rng_state(self.accelerator, *_which(self.device))
        random.setstate(self.python)
        numpy = sys.modules.get("numpy.random")
        if numpy is not None and self.numpy is not None:
            numpy.set_state(self.numpy)
        for generator, state in zip(self.generators, self.own, strict=True):
            _set_state(generator, state)

    def same_as(self, other: RandomState) -> bool:
        """Whether nothing was drawn between the two."""
        if not torch.equal(self.cpu, other.cpu) or self.drawn_outside_torch(other):
            return False
        if any(
            not torch.equal(a, b) for a, b in zip(self.own, other.own, strict=True) if isinstance(a, Tensor)
        ):
            return False
        if self.accelerator is None or other.accelerator is None:
            return True
        return torch.equal(self.accelerator, other.accelerator)

    def drawn_outside_torch(self, other: RandomState) -> str:
        """What else than torch's generators was drawn from between the two, "" for nothing."""
        if self.python != other.python:
            return "Python's `random`"
        if self.numpy is not other.numpy and pickle.dumps(self.numpy) != pickle.dumps(other.numpy):
            return "NumPy's `random`"
        for generator, a, b in zip(self.generators, self.own, other.own, strict=True):
            if not isinstance(a, Tensor) and pickle.dumps(a) != pickle.dumps(b):
                return f"a `{type(generator).__module__.partition('.')[0]}.{type(generator).__qualname__}`"
        return ""


@contextmanager
def preserved(device: torch.device, net: nn.Module | None = None) -> Iterator[RandomState]:
    """Whatever is drawn inside, the state afterwards is the one before; arguments as of
    `RandomState.now`."""
    with _kept(RandomState.now(device, net)) as before:
        yield before


@contextmanager
def preserved_for(problem: Problem) -> Iterator[RandomState]:
    """`preserved` for all that a problem can draw from."""
    with _kept(RandomState.of(problem)) as before:
        yield before


@contextmanager
def replayed(state: RandomState) -> Iterator[None]:
    """Draw inside what was drawn after `state`; the state afterwards is the one before."""
    with _kept(state.anew()):
        state.restore()
        yield


@contextmanager
def _kept(before: RandomState) -> Iterator[RandomState]:
    try:
        yield before
    finally:
        before.restore()


def _snapshot(device: torch.device, generators: tuple[Any, ...]) -> RandomState:
    on_device = None if device.type == "cpu" else _module(device).get_rng_state(*_which(device))
    numpy = sys.modules.get("numpy.random")
    return RandomState(
        device,
        generators,
        torch.get_rng_state(),
        on_device,
        random.getstate(),
        None if numpy is None else numpy.get_state(),
        tuple(map(_state, generators)),
    )


def _state(generator: Any) -> Any:
    if isinstance(generator, torch.Generator):
        return generator.get_state()
    if isinstance(generator, random.Random):
        return generator.getstate()
    if hasattr(generator, "get_state"):  # numpy.random.RandomState
        return generator.get_state(legacy=False)
    return getattr(
        generator, "bit_generator", generator
    ).state  # a numpy.random.Generator, or what it draws from


def _set_state(generator: Any, state: Any) -> None:
    if isinstance(generator, random.Random):
        generator.setstate(state)
    elif hasattr(generator, "set_state"):
        generator.set_state(state)
    else:
        getattr(generator, "bit_generator", generator).state = state


def _module(device: torch.device) -> Any:
    return torch.get_device_module(device)


def _which(device: torch.device) -> tuple[torch.device, ...]:
    """The argument that says which device, where there can be more than one."""
    return () if device.type == "mps" else (device,)
