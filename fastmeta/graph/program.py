"""The layer program: what a network is to every kernel backend."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Layer:
    """One layer. Value 0 is the network's input; value i + 1 is the output of layer i."""

    kind: str  # the stem of its files
    inputs: tuple[int, ...]  # values read
    shape: tuple[int, ...]  # of the output of one example (no batch dimension)
    params: tuple[str | None, ...] = ()  # (weight, bias); batch_norm: and mean and variance, if running
    function: str = ""  # elementwise: which one; avg_pool2d: "adaptive"
    constants: tuple[float, ...] = ()  # the kind's file says which


@dataclass(frozen=True, slots=True)
class Program:
    """A network as a list of layers, each naming its inputs: residual networks are lists too.

    `params` maps every parameter of the module, used or not, to its shape, in `named_parameters()`
    order; a tied parameter is listed once, under its first name.
    """

    input_shape: tuple[int, ...]  # one example
    layers: tuple[Layer, ...]
    output: int  # the value returned
    params: tuple[tuple[str, tuple[int, ...]], ...]
    buffers: tuple[tuple[str, tuple[int, ...]], ...] = ()  # those that some layer names: running statistics

    @property
    def output_shape(self) -> tuple[int, ...]:
        """Shape of the output of one example."""
        return self.value_shape(self.output)

    def value_shape(self, value: int) -> tuple[int, ...]:
        """Shape of a value for one example."""
        return self.layers[value - 1].shape if value else self.input_shape
