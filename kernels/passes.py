"""One pass over the network for all tasks: where its buffers are.

Values are dense, [T, rows of all examples, columns]; images are channels-last. Parameters of a task
stand one behind the other in a set [P]; the sets of all tasks are [T, P].
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from fastmeta.kernels.launch import Recorder
from torch import Tensor

from fastmeta.graph.nodes import Node, Value

__all__ = ["Node", "Operand", "Pass", "Sink", "Sinks", "Value", "no_sink"]


@dataclass(frozen=True, slots=True)
class Operand:
    """Something of which every task has its own, `stride` elements apart, or all the same (0)."""

    at: Tensor
    stride: int


@dataclass(slots=True)
class Sink:
    """Where the gradient of one parameter goes: to = [base +] gradient, or base - rate *
    gradient."""

    to: Operand
    base: Operand | None = None
    rate: Operand | None = None

    def arguments(self, prefix: str = "") -> dict[str, Any]:
        """As kernels with `deliver` take it; whatever else writes to this sink adds from now on."""
        found = {
            f"{prefix}to": self.to.at,
            f"{prefix}to_task": self.to.stride,
            f"{prefix}base": None if self.base is None else self.base.at,
            f"{prefix}base_task": 0 if self.base is None else self.base.stride,
            f"{prefix}rate": None if self.rate is None else self.rate.at,
            f"{prefix}rate_task": 0 if self.rate is None else self.rate.stride,
        }
        self.base = self.to
        return found


def no_sink(prefix: str = "") -> dict[str, Any]:
    """The arguments of a sink that nobody wants."""
    names = ("to", "base", "rate")
    return {f"{prefix}{name}{end}": None if end == "" else 0 for name in names for end in ("", "_task")}


Sinks = list["Sink | None"]


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
    x: list[Tensor | None]
    d: list[Tensor | None]
    rx: list[Tensor | None]
    rd: list[Tensor | None]
    curve: list[
        Tensor | None
    ]  # by value: its gradient times the second derivative of the function that made it
    state: dict[tuple[int, str], Tensor]  # by layer and name: what it keeps beside its values
    theta: list[Operand] = field(default_factory=list)
    v: list[Operand] = field(default_factory=list)
    new_state: Any = None  # (*shape, dtype) -> Tensor
    scratch: Any = None  # (name, elements, dtype = of the values) -> Tensor, good until the layer is done

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

    def keep(self, node: Node, name: str, *shape: int, dtype: Any = None) -> Tensor:
        """What a layer keeps beside its values, for as long as they are kept."""
        key = (node.index, name)
        if key not in self.state:
            self.state[key] = self.new_state(*shape, dtype=dtype)
        return self.state[key]
