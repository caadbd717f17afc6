"""From a layer program to what kernels run: one list of passes, for every backend.

A backend states what its kernels can do (`Capabilities`); `annotate` returns the graph with every
decision written down. No kernel looks at its neighbours again.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from fastmeta.graph.nodes import Graph, Node, Value
from fastmeta.graph.order import lay_out
from fastmeta.graph.program import Program
from fastmeta.layers.functions import FUNCTIONS
from fastmeta.layers.registry import KINDS

#: Whether kernels take two neighbouring nodes together: (graph, the first, the second).
Pair = Callable[[Graph, Node, Node], bool]


def _never(graph: Graph, first: Node, second: Node) -> bool:
    return False


@dataclass(frozen=True, slots=True, kw_only=True)
class Capabilities:
    """What the kernels of a backend can do beyond one layer at a time.

    Attributes:
        padded: rows are padded in memory: a reshape that changes their length moves numbers.
        image_input: kernels read the user's input channels-last; else it is turned by a reshape.
        windows: some kernels slide windows over images, and so read their height and width.
        folds_affine: element-wise kernels compute f(scale x + shift).
        absorbs: a layer and the element-wise layer after it are one, in all four functions.
        ends: the kernel of the layer before an element-wise one applies it in the forward pass, and
            that of the layer after it in the backward pass, as `epilogue` and `prologue` of the
            records allow.
        pools: a norm and the max-pool after it are one.
        pools_first: a relu between the two then comes after both.
        sums_tiles: a convolution sums its tiles for the norm after it.
        recomputes: a norm computes the convolution before it for itself.
        cancels_bias: the gradient of a bias that a norm takes away is known to be zero.
    """

    padded: bool
    image_input: bool = True
    windows: bool = True
    folds_affine: bool = False
    absorbs: Pair = _never
    ends: bool = False
    pools: Pair = _never
    pools_first: bool = False
    sums_tiles: Pair = _never
    recomputes: Pair = _never
    cancels_bias: bool = False


def annotate(
    program: Program, can: Capabilities, *, output_channels: bool = False, input_gradients: bool = False
) -> Graph:
    """The graph of a program for one backend.

    Args:
        program: the captured network.
        can: what the backend's kernels can do.
        output_channels: the output [C, d...] is wanted channels-last.
        input_gradients: gradients of the network's input are wanted.
    """
    graph = lay_out(program, output_channels)
    _drop_dead(graph)
    if not can.image_input:
        _turn_input(graph)
    _drop_views(graph, can)
    if can.folds_affine:
        _fold_affine(graph)
    if can.cancels_bias:
        _cancel_biases(graph)
    if can.pools_first:
        _fuse_pools(graph, can)
    _absorb(graph, can)
    if not can.pools_first:
        _fuse_pools(graph, can)
    if can.ends:
        _fuse_ends(graph)
    _sum_tiles(graph, can)
    _order_gradients(graph)
    _find_moving(graph)
    if not input_gradients:
        _recompute(graph, can)
    return graph


def side_by_side(pool: Node) -> bool:
    """Whether the windows of a pool lie side by side, without padding."""
    kh, kw, sh, sw, ph, pw = map(int, pool.constants[:6])
    return (kh, kw, 0, 0) == (sh, sw, ph, pw)


def channel_norm(node: Node) -> bool:
    """Whether a node normalises images by channel."""
    kind = KINDS.get(node.kind)
    return kind is not None and kind.family == "norm" and kind.order == "image"


def _drop_dead(graph: Graph) -> None:
    wanted, found = {graph.output}, []
    for node in reversed(graph.nodes):
        if node.output in wanted:
            wanted.update(node.inputs)
            found.append(node)
    graph.nodes = found[::-1]


# ---- views


def _turn_input(graph: Graph) -> None:
    """A reshape of the user's input, in PyTorch's order, where the network reads channels-last."""
    first = graph.values[0]
    if not first.turned:
        return
    turned = graph.new_value(first)
    graph.values[0] = Value(first.cols, first.rows, first.cols, 1, False)
    graph.replace_value(0, turned)
    graph.nodes.insert(0, Node(-1, "reshape", (0,), turned, ()))


def _drop_views(graph: Graph, can: Capabilities) -> None:
    """Drop every reshape that moves nothing."""
    for node in [node for node in graph.nodes if node.kind == "reshape"]:
        source, output = node.inputs[0], node.output
        a, b = graph.values[source], graph.values[output]
        # The user's input is dense: a reshape that is its only reader just says how to read it.
        says_how = source == 0 and graph.only_reader(0) is node and (can.image_input or not b.turned)
        if not _moves_nothing(a, b, can) and not (can.padded and says_how):
            continue
        graph.nodes.remove(node)
        if not can.padded:  # each keeps its own rows and columns
            graph.root[output] = graph.root[source]
            continue
        if b.channels or says_how:  # its readers take height and width from there
            graph.values[source] = b
        graph.replace_value(output, source)


def _moves_nothing(a: Value, b: Value, can: Capabilities) -> bool:
    """Whether a reshape from a to b leaves every number where it is."""
    if a.turned != b.turned:
        return False
    if (a.turned or can.padded) and (a.rows, a.cols) != (b.rows, b.cols):
        return False
    # Where one value takes the place of the other, both must have the same height and width.
    shared = can.padded and can.windows and a.channels and b.channels
    return not shared or (a.height, a.width) == (b.height, b.width)


# ---- element-wise layers


def _fold_affine(graph: Graph) -> None:
    """scale x + shift goes into the element-wise layer after it."""
    for node in list(graph.nodes):
        if node.kind != "elementwise" or node.function != "affine":
            continue
        reader = graph.only_reader(node.output)
        if reader is None or reader.kind != "elementwise":
            continue
        c0, c1 = node.constants
        shift = reader.scale * (c0 * node.shift + c1) + reader.shift
        reader.scale, reader.shift = reader.scale * c0 * node.scale, shift
        reader.inputs = node.inputs
        graph.nodes.remove(node)


def _absorb(graph: Graph, can: Capabilities) -> None:
    """A layer and the element-wise layer after it become one node."""
    for node in list(graph.nodes):
        f = graph.only_reader(node.output)
        if f is None or f.kind != "elementwise" or not can.absorbs(graph, node, f):
            continue
        node.before, node.output, node.epilogue = node.output, f.output, f
        graph.nodes.remove(f)


def _fuse_ends(graph: Graph) -> None:
    """Element-wise layers are done at the end of the kernels around them."""
    for node in graph.nodes:
        node.prologues = [None] * len(node.inputs)
    for f in graph.nodes:
        if f.kind != "elementwise":
            continue
        before, after = graph.maker(f.inputs[0]), graph.only_reader(f.output)
        function = FUNCTIONS[f.function]
        if before is not None and KINDS[before.kind].epilogue and graph.only_reader(f.inputs[0]) is f:
            f.in_forward, before.epilogue = True, f
            if function.told_by_output(f.constants):
                graph.no_value.add(graph.root[before.output])
            if function.piecewise_linear:
                graph.no_tangent.add(graph.root[before.output])
        if after is not None and after.kind in KINDS and KINDS[after.kind].prologue:
            f.in_backward, after.prologues[0] = True, f
            graph.no_delta.add(graph.root[f.output])
        if not function.piecewise_linear:
            graph.curved.add(graph.root[f.output])


# ---- norms


def _cancel_biases(graph: Graph) -> None:
    """Mark biases that the norm after the layer subtracts again, with the mean of each channel."""
    for node in graph.nodes:
        norm = graph.only_reader(node.output)
        if not KINDS[node.kind].matrix or norm is None:
            continue
        channels = graph.values[norm.inputs[0]].cols if norm.inputs else 0
        node.bias_cancels = (norm.kind == "batch_norm" and norm.params[2] is None) or (
            norm.kind == "group_norm" and int(norm.constants[0]) == channels
        )


def _fuse_pools(graph: Graph, can: Capabilities) -> None:
    """A norm takes over the max-pool after it.

    A relu between the two may come after both: it is monotone, and where it is flat no gradient
    passes.
    """
    for norm in [node for node in graph.nodes if channel_norm(node)]:
        after = graph.only_reader(norm.output)
        relu = None
        plain = after is not None and after.function == "relu" and after.scale > 0 and not after.shift
        if can.pools_first and after is not None and plain:
            relu, after = after, graph.only_reader(after.output)
        if after is None or after.kind != "max_pool2d" or not can.pools(graph, norm, after):
            continue
        norm.pool = (int(after.constants[0]), int(after.constants[1]))
        graph.nodes.remove(after)
        if relu is None:
            norm.output = after.output
            continue
        norm.output = graph.new_value(graph.values[after.output])
        position = graph.nodes.index(relu)
        graph.nodes[position] = replace(relu, inputs=(norm.output,), output=after.output)


def _sum_tiles(graph: Graph, can: Capabilities) -> None:
    for norm in graph.nodes:
        conv = graph.maker(norm.inputs[0])
        free = conv is not None and conv.epilogue is None and conv.norm is None
        if conv is not None and free and can.sums_tiles(graph, conv, norm):
            conv.norm, norm.sums_from = norm, conv


def _recompute(graph: Graph, can: Capabilities) -> None:
    """A norm computes the convolution of the input before it for itself, so that it is not kept."""
    for norm in list(graph.nodes):
        conv = graph.maker(norm.inputs[0])
        if conv is None or conv.kind != "conv2d" or graph.root[conv.inputs[0]] != graph.root[0]:
            continue
        if graph.only_reader(conv.output) is norm and can.recomputes(graph, conv, norm):
            norm.recomputes = conv


# ---- gradients


def _order_gradients(graph: Graph) -> None:
    """Which of several readers of a value writes its gradient first, and which is the last.

    The backward pass goes through the nodes in reverse.
    """
    written: set[int] = set()
    final: dict[int, tuple[Node, int]] = {}
    for node in graph.nodes:
        node.adds, node.last = [False] * len(node.inputs), [False] * len(node.inputs)
    for node in reversed(graph.nodes):
        if node.in_backward:
            continue
        for j, value in enumerate(node.inputs):
            f = node.prologues[j] if node.prologues else None
            writer, at = (node, j) if f is None else (f, 0)
            root = graph.root[value if f is None else f.inputs[0]]
            writer.adds[at] = root in written
            written.add(root)
            final[root] = (writer, at)
    for node, j in final.values():
        node.last[j] = True


def _find_moving(graph: Graph) -> None:
    """Which values depend on a parameter: they have a tangent, and a gradient worth computing."""
    graph.from_params = [False] * len(graph.values)
    for node in graph.nodes:
        moves = any(p is not None and p < graph.parameters for p in node.params)
        moves = moves or any(graph.from_params[v] for v in node.inputs)
        roots = {graph.root[node.output]} | ({graph.root[node.before]} if node.before is not None else set())
        for value, root in enumerate(graph.root):
            if root in roots:
                graph.from_params[value] = moves
