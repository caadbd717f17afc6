"""From a layer program to what the Triton kernels run: without dead layers and idle reshapes, and
fused."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field, replace

from fastmeta.backends._layout import lay_out
from fastmeta.graph.program import Program
from fastmeta.kernels.elementwise import PIECEWISE_LINEAR, from_output
from fastmeta.kernels.passes import Node, Value
from fastmeta.kernels.recomputed_conv import is_small

#: Kinds whose kernels apply an element-wise layer to what they make, and to the gradient of what
#: they read.
_EPILOGUE = frozenset({"linear", "conv2d", "batch_norm", "group_norm", "layer_norm"})
_PROLOGUE = frozenset({"linear", "conv2d"})


@dataclass(slots=True)
class Network:
    """The nodes in order. Values that share a root share their memory."""

    nodes: list[Node]
    values: list[Value]
    root: list[int]
    output: int
    params: list[str]  # every parameter of the module, then the buffers in use
    shapes: list[tuple[int, ...]]  # in PyTorch's layout
    used: set[int]  # parameters that some node reads
    from_params: list[bool] = field(default_factory=list)
    # roots that need no memory of their own for this, since an epilogue goes on at once
    no_value: set[int] = field(default_factory=set)
    no_tangent: set[int] = field(default_factory=set)
    no_delta: set[int] = field(default_factory=set)
    curved: set[int] = field(default_factory=set)  # roots: outputs of functions with a second derivative


def build(program: Program, input_gradients: bool, output_channels: bool = False) -> Network:
    """Analyse a program.

    Args:
        program: the network.
        input_gradients: gradients of the network's input are wanted.
        output_channels: the output [C, d...] is wanted channels-last.
    """
    engine = lay_out(program, output_channels)
    values = [Value(*value) for value in engine.values]
    buffers = [name for name, _ in program.buffers]
    shapes = dict(program.params) | dict(program.buffers)
    params = [name for name, _ in program.params] + buffers
    index = {name: i for i, name in enumerate(params)}
    nodes = []
    for i, (layer, inputs, output) in enumerate(engine.layers):
        own = tuple(None if name is None else index.get(name) for name in layer.params)
        nodes.append(
            Node(i, layer.kind, inputs, output, own, layer.function, layer.constants, shape=layer.shape)
        )
    net = Network(
        _alive(nodes, engine.output), values, [*range(len(values))], engine.output, params, [], set()
    )
    net.shapes = [shapes[name] for name in params]
    _drop_views(net)
    _merge_affine(net)
    _fuse_pools(net)
    _fuse_elementwise(net)
    _fuse_statistics(net)
    _order_gradients(net)
    net.used = {p for node in net.nodes for p in node.params if p is not None and p < len(program.params)}
    net.from_params = [False] * len(net.values)
    for node in net.nodes:
        moves = any(p is not None and p < len(program.params) for p in node.params)
        net.from_params[node.output] = moves or any(net.from_params[v] for v in node.inputs)
        for value, root in enumerate(net.root):
            if root == net.root[node.output]:
                net.from_params[value] = net.from_params[node.output]
    if not input_gradients:
        _choose_recomputed(net)
    return net


def engine_shape(shape: tuple[int, ...], node_kind: str) -> tuple[int, ...]:
    """A parameter as the kernels read it: a convolution's weight is [O, *taps, C]."""
    return (shape[0], *shape[2:], shape[1]) if node_kind == "conv2d" else shape


def _alive(nodes: list[Node], output: int) -> list[Node]:
    """The nodes that the output depends on."""
    wanted, found = {output}, []
    for node in reversed(nodes):
        if node.output in wanted:
            wanted.update(node.inputs)
            found.append(node)
    return found[::-1]


def moves_nothing(a: Value, b: Value) -> bool:
    """Whether a reshape from a to b leaves every number where it is."""
    a_image = a.channels and min(a.rows, a.cols) > 1
    b_image = b.channels and min(b.rows, b.cols) > 1
    return (not a_image and not b_image) or (a_image and b_image and (a.rows, a.cols) == (b.rows, b.cols))


def _drop_views(net: Network) -> None:
    kept = []
    for node in net.nodes:
        if node.kind == "reshape" and moves_nothing(net.values[node.inputs[0]], net.values[node.output]):
            net.root[node.output] = net.root[node.inputs[0]]
        else:
            kept.append(node)
    net.nodes = kept


def _consumers(net: Network) -> dict[int, list[Node]]:
    """By root, the nodes that read it; the network's output counts as read by one more."""
    found: dict[int, list[Node]] = defaultdict(list)
    for node in net.nodes:
        for value in node.inputs:
            found[net.root[value]].append(node)
    found[net.root[net.output]].append(Node(-1, "output", (), -1, ()))
    return found


def _maker(net: Network, value: int) -> Node | None:
    return next((node for node in net.nodes if net.root[node.output] == net.root[value]), None)


def _merge_affine(net: Network) -> None:
    """scale x + shift goes into the element-wise layer behind it."""
    for node in list(net.nodes):
        if node.kind != "elementwise" or node.function != "affine":
            continue
        readers = _consumers(net)[net.root[node.output]]
        if len(readers) != 1 or readers[0].kind != "elementwise":
            continue
        (reader,) = readers
        c0, c1 = node.constants
        shift = reader.scale * (c0 * node.shift + c1) + reader.shift
        reader.scale, reader.shift = reader.scale * c0 * node.scale, shift
        reader.inputs = node.inputs
        net.nodes.remove(node)


def _fuse_pools(net: Network) -> None:
    """A norm takes over the max-pool behind it, and a relu between them moves behind: it is
    monotone, and where it is flat no gradient passes."""
    for norm in list(net.nodes):
        if norm.kind not in ("batch_norm", "group_norm"):
            continue
        consumers = _consumers(net)
        readers = consumers[net.root[norm.output]]
        relu = None
        if (
            len(readers) == 1
            and readers[0].function == "relu"
            and readers[0].scale > 0
            and not readers[0].shift
        ):
            relu = readers[0]
            readers = consumers[net.root[relu.output]]
        if len(readers) != 1 or readers[0].kind != "max_pool2d" or not _side_by_side(readers[0]):
            continue
        (pool,) = readers
        norm.pool = (int(pool.constants[0]), int(pool.constants[1]))
        net.nodes.remove(pool)
        if relu is None:
            norm.output = pool.output
            continue
        net.values.append(net.values[pool.output])
        net.root.append(len(net.root))
        norm.output = relu_input = len(net.values) - 1
        position = net.nodes.index(relu)
        net.nodes[position] = replace(relu, inputs=(relu_input,), output=pool.output)


def _side_by_side(pool: Node) -> bool:
    kh, kw, sh, sw, ph, pw = map(int, pool.constants[:6])
    return (kh, kw, 0, 0) == (sh, sw, ph, pw)


def _fuse_elementwise(net: Network) -> None:
    consumers = _consumers(net)
    for node in net.nodes:
        node.prologues = [None] * len(node.inputs)
    for f in net.nodes:
        if f.kind != "elementwise":
            continue
        before, behind = _maker(net, f.inputs[0]), consumers[net.root[f.output]]
        if before is not None and before.kind in _EPILOGUE and len(consumers[net.root[f.inputs[0]]]) == 1:
            f.in_forward, before.epilogue = True, f
            if from_output(f):
                net.no_value.add(net.root[before.output])
            if f.function in PIECEWISE_LINEAR:
                net.no_tangent.add(net.root[before.output])
        if len(behind) == 1 and behind[0].kind in _PROLOGUE:
            f.in_backward, behind[0].prologues[0] = True, f
            net.no_delta.add(net.root[f.output])
        if f.function not in PIECEWISE_LINEAR:
            net.curved.add(net.root[f.output])


def _fuse_statistics(net: Network) -> None:
    """A convolution sums its tiles for the batch norm behind it, which then need not read the image
    for that."""
    for norm in net.nodes:
        if (
            norm.kind != "batch_norm" or norm.params[2] is not None
        ):  # of running statistics there is nothing to sum
            continue
        maker = _maker(net, norm.inputs[0])
        if maker is None or maker.kind != "conv2d" or maker.epilogue is not None or maker.norm is not None:
            continue
        if net.values[maker.output].cols == net.values[norm.inputs[0]].cols:
            maker.norm, norm.sums_from = norm, maker


def _choose_recomputed(net: Network) -> None:
    """The norm behind a small convolution of the input computes it for itself: nothing of it is
    kept in memory."""
    consumers = _consumers(net)
    for norm in list(net.nodes):
        conv = norm.sums_from
        if conv is None or net.root[conv.inputs[0]] != net.root[0]:
            continue
        if len(consumers[net.root[conv.output]]) > 1 or not is_small(conv, net.values[conv.inputs[0]].cols):
            continue
        if net.values[conv.output] != net.values[norm.inputs[0]]:  # read under another height and width
            continue
        norm.sums_from, norm.recomputes = None, conv
        net.nodes.remove(conv)


def _order_gradients(net: Network) -> None:
    """Who of several consumers of a value writes its gradient first; backward goes through the
    nodes in reverse."""
    written: set[int] = set()
    for node in net.nodes:
        node.adds = [False] * len(node.inputs)
    for node in reversed(net.nodes):
        if node.in_backward:
            continue
        for j, value in enumerate(node.inputs):
            f = node.prologues[j]
            writer, at = (node, j) if f is None else (f, 0)
            root = net.root[value if f is None else f.inputs[0]]
            writer.adds[at] = root in written
            written.add(root)
