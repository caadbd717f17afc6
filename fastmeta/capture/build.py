"""What the rules of a layer kind work with: traced values, parameters, and the list of layers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor, nn

from fastmeta.graph.program import Layer
from fastmeta.models.check import is_finite

#: How one operator is captured, and a kind's tables of them: see `fastmeta.capture.kinds`.
Rule = Callable[..., Any]
Modules = dict[type[nn.Module], tuple[Rule, tuple[str, ...]]]
Functions = dict[Callable[..., Any], Rule]
Methods = dict[str, Rule]


class Refused(BaseException):
    """A network, or an operator in it, cannot be a layer program; the message says why.

    Never seen outside of capture. It is no `Exception`, so that a forward's own `except Exception`
    cannot hide it.
    """


class Batch:
    """The batch dimension in a traced size. It has no arithmetic: a program holds for any batch."""

    def __repr__(self) -> str:
        return "N"


BATCH: Final = Batch()


@dataclass(frozen=True, slots=True, eq=False)
class Value:
    """A traced tensor [N, *shape]: its number in the program, and whose memory it may share."""

    index: int
    shape: tuple[int, ...]
    memory: int
    version: int


@dataclass(frozen=True, slots=True)
class Parameter:
    """A parameter of the network, under its first name in `named_parameters()`."""

    name: str
    shape: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Constant:
    """A tensor that is no parameter (a buffer, a plain attribute)."""

    name: str


@dataclass(frozen=True, slots=True)
class Buffer(Constant):
    """A buffer, under its first name in `named_buffers()`; only running statistics are read."""

    shape: tuple[int, ...]


class Builder:
    """The layers of a program under construction.

    Memory is followed only to judge in-place operators: values that may share memory (views) carry
    the same `memory`, an in-place operator raises that memory's version, and a value of an older
    version must not be read again.
    """

    def __init__(
        self,
        input_shape: tuple[int, ...],
        parameters: Mapping[int, Parameter],
        buffers: Mapping[int, Buffer],
        dtype: torch.dtype,
        batch_stats: str = "task",
    ) -> None:
        #: of the input
        self.dtype = dtype
        #: what norms of the batch normalise by, as in `fastmeta.network.functional.call`
        self.batch_stats = batch_stats
        self.layers: list[Layer] = []
        self.input = Value(0, input_shape, memory=0, version=0)
        self._versions = [0]
        self._tensors: Mapping[int, Parameter | Buffer] = {**buffers, **parameters}

    def layer(
        self,
        kind: str,
        inputs: tuple[Any, ...],
        shape: tuple[int, ...],
        params: tuple[str | None, ...] = (),
        function: str = "",
        constants: tuple[float, ...] = (),
        *,
        view: bool = False,
        inplace: bool = False,
    ) -> Value:
        """Add a layer and return its output.

        Args:
            kind, shape, params, function, constants: as `Layer` has them.
            inputs: the values read; anything else is refused.
            view: the output may share memory with the first input.
            inplace: the operator writes its output over its first input.
        """
        for value in inputs:
            if not isinstance(value, Value):
                raise Refused(f"a traced tensor was expected, got {described(value)}")
        if inplace:
            self._overwrite(inputs[0])
        self.layers.append(Layer(kind, tuple(v.index for v in inputs), shape, params, function, constants))
        if view or inplace:
            memory = inputs[0].memory
        else:
            memory = len(self._versions)
            self._versions.append(0)
        return Value(len(self.layers), shape, memory, self._versions[memory])

    def check_readable(self, value: Value) -> None:
        """Refuse to read a value that an in-place operator has overwritten since it was made."""
        if value.version != self._versions[value.memory]:
            raise Refused("it reads a tensor that an in-place operator has overwritten")

    def parameter(self, tensor: Tensor, name: str) -> Parameter | Constant:
        """The parameter or buffer that a tensor of the network is, or a constant called `name`."""
        return self._tensors.get(id(tensor), Constant(name))

    def _overwrite(self, value: Value) -> None:
        if value.memory == self.input.memory:
            raise Refused("it modifies the network's own input in place")
        self._versions[value.memory] += 1


def number(value: Any) -> float:
    """A finite Python number as a float; anything else is refused."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise Refused(f"a Python number was expected, got {described(value)}")
    if not is_finite(value):
        raise Refused(f"a finite number was expected, got {value}")
    return float(value)


def integer(value: Any) -> int:
    """A Python int; anything else is refused."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise Refused(f"an int was expected, got {described(value)}")
    return value


def batched(shape: tuple[Any, ...] | list[Any]) -> str:
    """The shape of one example as a refusal writes it with its batch: [N, 3, 4]."""
    return f"[{', '.join(map(str, ('N', *shape)))}]"


def described(value: Any) -> str:
    """A value as a refusal names it."""
    if isinstance(value, Value):
        return "a traced tensor"
    if isinstance(value, Parameter):
        return f"the parameter `{value.name}`"
    if isinstance(value, Buffer):
        return f"the tensor `net.{value.name}`, a buffer or constant"
    if isinstance(value, Constant):
        return f"the tensor `{value.name}`, a buffer or constant"
    if isinstance(value, Batch):
        return "the batch size"
    if isinstance(value, (tuple, list, dict)):
        return f"a {type(value).__name__}"
    return repr(value)
