"""One pass over the network for all tasks: where its buffers are.

Values are dense, [T, rows of all examples, columns]; images are channels-last. The parameters of a
task stand one after the other in a set [P]; the sets of all tasks are [T, P].
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from torch import Tensor, dtype

from fastmeta.graph.nodes import Node, Value
from fastmeta.kernels.launch import Recorder

__all__ = [
    "NOWHERE",
    "Buffer",
    "Factors",
    "Node",
    "Operand",
    "Pass",
    "Products",
    "Sink",
    "Sinks",
    "Target",
    "Value",
    "target",
    "there",
]


#: Of a value or a parameter; None where nobody needs it.
Buffer = Tensor | None


def there(buffer: Buffer) -> Tensor:
    """A buffer that this kind of call needs, and so has."""
    if buffer is None:
        raise ValueError("a kernel needs a buffer that was not made")
    return buffer


class Operand(NamedTuple):
    """Something of which every task has its own, `stride` elements apart, or all the same (0).

    Kernels take it as one argument and read `at + task * stride`.
    """

    at: Tensor
    stride: int


class Target(NamedTuple):
    """Where the gradient of one parameter goes, as one argument of a kernel: see `tile.deliver`.

    to = [base +] gradient, or base - rate * gradient; nowhere, if `to` is None. A kernel asks for
    `target.to is None`, never for `target is None`: Triton 3.6 compares no tuple that has a None.
    """

    to: Operand | None
    base: Operand | None
    rate: Operand | None


#: Of a gradient that nobody wants.
NOWHERE = Target(None, None, None)


@dataclass(slots=True)
class Sink:
    """Where the gradient of one parameter goes: to = [base +] gradient, or base - rate *
    gradient."""

    to: Operand
    base: Operand | None = None
    rate: Operand | None = None

    def target(self) -> Target:
        """For one launch; whatever else writes to this sink adds to it from now on."""
        found = Target(self.to, self.base, self.rate)
        self.base = self.to
        return found


def target(sink: Sink | None) -> Target:
    """For one launch; nowhere, if nobody wants the gradient."""
    return NOWHERE if sink is None else sink.target()


#: By parameter.
Sinks = list[Sink | None]

#: A value and the weight that it is multiplied by; of several, one sum.
Products = list[tuple[Buffer, Operand]]

#: A gradient dy and a value x, whose product dy^T x is part of a weight's gradient.
Factors = list[tuple[Buffer, Buffer]]


def _unset(*_: Any, **__: Any) -> Tensor:
    raise ValueError("this pass has no memory to give")


@dataclass(slots=True)
class Pass:
    """Buffers by value and by parameter, for `examples` examples of each of `tasks` tasks."""

    emit: Recorder
    nodes: list[Node]
    values: list[Value]
    tasks: int
    examples: int
    precision: str
    second: bool  # a Hessian-vector product follows: what it reads is kept
    from_params: list[bool]  # by value: whether it depends on a parameter and so has a tangent
    wants_input: bool  # the gradient of value 0 is wanted
    x: list[Buffer]  # by value, as all of these
    d: list[Buffer]  # gradients
    rx: list[Buffer]  # tangents
    rd: list[Buffer]  # tangents of gradients
    curve: list[Buffer]  # gradients times the second derivative of the function that made the value
    state: dict[tuple[int, str], Tensor]  # by layer and name: what it keeps beside its values
    theta: list[Operand] = field(default_factory=list)
    v: list[Operand] = field(default_factory=list)
    # (*shape, dtype) -> Tensor
    new_state: Callable[..., Tensor] = _unset
    # (name, elements, dtype = that of the values) -> Tensor, good until the layer is done
    scratch: Callable[..., Tensor] = _unset

    @property
    def wide(self) -> bool:
        """Whether elements have eight bytes."""
        return self.theta[0].at.element_size() == 8

    def rows(self, value: int) -> int:
        """Rows of one task."""
        return self.examples * self.values[value].rows

    def elements(self, value: int) -> int:
        """Elements of one task."""
        return self.examples * self.values[value].size

    def wants_delta(self, value: int) -> bool:
        """Whether somebody reads the gradient of a value."""
        return self.from_params[value] or self.wants_input

    def has_tangent(self, value: int) -> bool:
        """Whether a value moves with the parameters."""
        return self.from_params[value]

    def weights(self, which: list[Operand], node: Node) -> tuple[Operand, Operand | None]:
        """(weight, bias) of a layer that has a weight, of `theta` or `v`."""
        weight, bias = node.params
        if weight is None:
            raise ValueError(f"{node.kind} without a weight")
        return which[weight], None if bias is None else which[bias]

    def operand(self, which: list[Operand], node: Node, index: int) -> Operand | None:
        """A layer's parameter, of `theta` or `v`; None where it has none."""
        p = node.params[index] if index < len(node.params) else None
        return None if p is None else which[p]

    def keep(self, node: Node, name: str, *shape: int, dtype: dtype | None = None) -> Tensor:
        """What a layer keeps beside its values, for as long as they are kept."""
        key = (node.index, name)
        if key not in self.state:
            self.state[key] = self.new_state(*shape, dtype=dtype)
        return self.state[key]
