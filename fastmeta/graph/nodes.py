"""The graph that kernels run: a layer program with every value's place, and what the passes say."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class Value:
    """One example of a value, as rows of columns.

    An image [C, H, W] that is channels-last has a column for each channel and a row for each pixel.
    Everything else is in PyTorch's order, the last dimension in columns.
    """

    rows: int
    cols: int
    height: int
    width: int
    channels: bool  # channels-last

    @property
    def size(self) -> int:
        """Elements of one example."""
        return self.rows * self.cols

    @property
    def turned(self) -> bool:
        """Whether its elements lie in another order than PyTorch's."""
        return self.channels and self.rows > 1 and self.cols > 1


@dataclass(slots=True, eq=False)
class Node:
    """A layer, and what the passes have decided about it."""

    index: int
    kind: str
    inputs: tuple[int, ...]  # values read
    output: int
    params: tuple[int | None, ...]  # places in `Graph.params`
    function: str = ""
    constants: tuple[float, ...] = ()
    shape: tuple[int, ...] = ()  # of the output of one example, as the program has it
    # The backward pass goes through the nodes in reverse. For each input: another reader has
    # written its gradient already (`adds`); no other reader adds to it afterwards (`last`).
    adds: list[bool] = field(default_factory=list)
    last: list[bool] = field(default_factory=list)
    # ---- element-wise layers
    scale: float = 1.0  # f(scale x + shift)
    shift: float = 0.0
    in_forward: bool = False  # done by the layer before it, at its end
    in_backward: bool = False  # its gradient is done by the layer after it
    # ---- other layers
    epilogue: Node | None = None  # the element-wise layer that is done at the end of this one
    before: int | None = None  # the value between the two, where the node's output is the epilogue's
    prologues: list[Node | None] = field(default_factory=list)  # by input: its gradient is done here
    bias_cancels: bool = False  # a norm after it takes the bias away again: its gradient is zero
    # ---- norms
    pool: tuple[int, int] | None = None  # the windows of a max-pool that is done here
    sums_from: Node | None = None  # the conv2d whose kernel sums its tiles for this norm
    recomputes: Node | None = None  # a conv2d that is computed here instead of being kept
    norm: Node | None = None  # of a conv2d: the norm that its tiles are summed for


@dataclass(slots=True)
class Graph:
    """Nodes in the order of the forward pass. Values with the same root share their memory."""

    nodes: list[Node]
    values: list[Value]
    output: int
    params: list[str]  # every parameter of the module, then the buffers that are read
    shapes: list[tuple[int, ...]]  # of these, in PyTorch's layout
    parameters: int  # so many of `params` are parameters
    root: list[int] = field(default_factory=list)
    from_params: list[bool] = field(default_factory=list)  # by value: depends on a parameter
    # Roots that need no memory for their value, tangent or gradient: a neighbour uses it at once.
    no_value: set[int] = field(default_factory=set)
    no_tangent: set[int] = field(default_factory=set)
    no_delta: set[int] = field(default_factory=set)
    curved: set[int] = field(default_factory=set)  # roots: outputs of functions with a second derivative

    @property
    def used(self) -> set[int]:
        """The parameters that some node reads."""
        return {p for node in self.every() for p in node.params if p is not None and p < self.parameters}

    def every(self) -> Iterator[Node]:
        """All nodes, with those that a norm computes for itself, each once."""
        for node in self.nodes:
            if node.recomputes is not None and node.recomputes not in self.nodes:
                yield node.recomputes
            yield node

    def readers(self, value: int) -> list[Node]:
        """The nodes that read a value, once for each input; the network's output counts as one."""
        root = self.root[value]
        found = [node for node in self.nodes for v in node.inputs if self.root[v] == root]
        return [*found, OUTPUT] if self.root[self.output] == root else found

    def only_reader(self, value: int) -> Node | None:
        """The one node that reads a value, if there is just one."""
        readers = self.readers(value)
        return readers[0] if len(readers) == 1 else None

    def maker(self, value: int) -> Node | None:
        """The node that writes a value; None for the input."""
        root = self.root[value]
        return next((node for node in self.nodes if self.root[node.output] == root), None)

    def new_value(self, value: Value) -> int:
        """Another value, with memory of its own."""
        self.values.append(value)
        self.root.append(len(self.root))
        return len(self.root) - 1

    def replace_value(self, old: int, new: int) -> None:
        """Make all readers of `old` read `new`."""
        for node in self.nodes:
            node.inputs = tuple(new if v == old else v for v in node.inputs)
        if self.output == old:
            self.output = new


#: Stands for the reader of the network's output.
OUTPUT = Node(-1, "output", (), -1, ())
