"""elementwise: a pointwise function f on a value of any shape, alone or at the end of the kernel
of another layer.

    forward           y   = f(x)
    backward          dx  = dy f'(x),                 curve = dy f''(x)
    tangent           ry  = rx f'(x)
    tangent_backward  rdx = rdy f'(x) + curve rx

The functions themselves, with scale and shift: `functions`. Their derivatives read `saved`, which
is y where `from_output` says so and x elsewhere, so that an epilogue that applies a function of the
first sort need not write x down.
"""

from __future__ import annotations

from typing import NamedTuple

import triton.language as tl

from fastmeta.kernels.functions import chained, second, value
from fastmeta.kernels.jit import jit, varies
from fastmeta.kernels.launch import FLAT, blocks
from fastmeta.kernels.passes import Buffer, Node, Pass, Sinks
from fastmeta.layers.functions import FUNCTIONS

#: Functions whose second derivative is zero.
PIECEWISE_LINEAR = frozenset(name for name, row in FUNCTIONS.items() if row.piecewise_linear)


def from_output(node: Node) -> bool:
    """Whether the derivatives of an element-wise layer follow from its value."""
    return FUNCTIONS[node.function].told_by_output(node.constants)


class End(NamedTuple):
    """What `finish` reads and writes, as one argument of a kernel: each has the shape of what the
    kernel makes, and is None where there is nothing to do."""

    out: Buffer  # the result, of the function where there is one
    pre: Buffer  # takes what the function is applied to: x of forward, rx of tangent
    saved: Buffer  # what the derivatives read
    curve: Buffer  # dy f''(x): written by backward, read by tangent_backward
    moved: Buffer  # rx, of tangent_backward


class Finish(NamedTuple):
    """What `finish` does, as one argument that is known when a kernel is compiled.

    Flat, and handed on as a whole: Triton 3.6 can compare a member that is a string, and no more.
    """

    mode: str  # "forward", "backward", "tangent" or "tangent_backward"
    add: bool  # to what is in `out` already
    function: str = ""  # of `functions`; "" for none: the result is stored as it is
    c0: float = 0.0  # the function's constants
    c1: float = 0.0
    scale: float = 1.0  # f(scale x + shift)
    shift: float = 0.0


class Epilogue(NamedTuple):
    """Both, for a launch: `run.emit(kernel, ..., **epilogue._asdict())`."""

    end: End
    FINISH: Finish


@jit
def finish(acc, at, mask, end: End, F: tl.constexpr):
    """The end of a kernel that made `acc`: an element-wise layer of it, or nothing, stored or added
    to `end.out`.

    Args:
        acc: a block of any shape.
        at: of that shape: its places in the tensors of `end`, of which `mask` are there.
        end: those tensors.
        F: a `Finish`.
    """
    if end.pre is not None:
        tl.store(end.pre + at, acc, mask=mask)
    if F.function != "":
        if F.mode == "forward":
            acc = value(acc, F)
        else:
            tl.static_assert(
                F.mode == "tangent" or F.mode == "backward" or F.mode == "tangent_backward",
                "finish: no such mode",
            )
            s = tl.load(end.saved + at, mask=mask, other=0.0)
            if F.mode == "backward":
                if end.curve is not None:
                    tl.store(end.curve + at, acc * second(s, F), mask=mask)
            acc = chained(acc, s, F)
            if F.mode == "tangent_backward":
                if end.moved is not None:
                    acc += tl.load(end.curve + at, mask=mask, other=0.0) * tl.load(
                        end.moved + at, mask=mask, other=0.0
                    )
    if F.add:
        acc += tl.load(end.out + at, mask=mask, other=0.0)
    tl.store(end.out + at, acc, mask=mask)


@jit
@varies("size")
def apply(
    source,  # [size]
    end: End,  # each [size]
    size,
    FINISH: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One element-wise layer as a kernel of its own: end = finish(source)."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = at < size
    acc = tl.load(source + at, mask=mask, other=0.0)
    finish(acc, at, mask, end, FINISH)


def _finish(node: Node | None, mode: str, add: bool = False) -> Finish:
    """Of an element-wise layer, or of none."""
    if node is None:
        return Finish(mode, add)
    c0, c1 = (*node.constants, 0.0, 0.0)[:2]
    # functions that read their value for some constants have a second form for the others
    sometimes = callable(FUNCTIONS[node.function].from_output)
    function = f"{node.function}_of_x" if sometimes and not from_output(node) else node.function
    return Finish(mode, add, function, c0, c1, node.scale, node.shift)


def _saved(run: Pass, node: Node) -> Buffer:
    return run.x[node.output if from_output(node) else node.inputs[0]]


def _smooth(node: Node) -> bool:
    return node.function not in PIECEWISE_LINEAR


def forward_end(run: Pass, node: Node) -> Epilogue:
    """The end of the kernel that makes a value: its own output, or that of the function on it."""
    f = node.epilogue
    if f is None:
        return Epilogue(End(run.x[node.output], None, None, None, None), _finish(None, "forward"))
    return Epilogue(End(run.x[f.output], run.x[node.output], None, None, None), _finish(f, "forward"))


def tangent_end(run: Pass, node: Node) -> Epilogue:
    """The same for the tangent of what a layer makes."""
    f = node.epilogue
    if f is None:
        return Epilogue(End(run.rx[node.output], None, None, None, None), _finish(None, "tangent"))
    end = End(run.rx[f.output], run.rx[node.output], _saved(run, f), None, None)
    return Epilogue(end, _finish(f, "tangent"))


def backward_end(run: Pass, node: Node, which: int = 0) -> Epilogue:
    """The end of the kernel that makes the gradient of a layer's input: that of the function before
    it, if it goes on to the gradient of that function's argument."""
    f = node.prologues[which]
    if f is None:
        out = run.d[node.inputs[which]]
        return Epilogue(End(out, None, None, None, None), _finish(None, "backward", node.adds[which]))
    return _function_backward(run, f)


def tangent_backward_end(run: Pass, node: Node, which: int = 0) -> Epilogue:
    """The same for the tangent of the gradient."""
    f = node.prologues[which]
    if f is None:
        out = run.rd[node.inputs[which]]
        return Epilogue(End(out, None, None, None, None), _finish(None, "tangent_backward", node.adds[which]))
    return _function_tangent_backward(run, f)


def _function_backward(run: Pass, f: Node) -> Epilogue:
    """dx = dy f'(x) of the function f."""
    curve = run.curve[f.output] if run.second and _smooth(f) else None
    end = End(run.d[f.inputs[0]], None, _saved(run, f), curve, None)
    return Epilogue(end, _finish(f, "backward", f.adds[0]))


def _function_tangent_backward(run: Pass, f: Node) -> Epilogue:
    """rdx = rdy f'(x) + dy f''(x) rx of the function f."""
    moves = _smooth(f) and run.has_tangent(f.inputs[0])
    curve, moved = (run.curve[f.output], run.rx[f.inputs[0]]) if moves else (None, None)
    end = End(run.rd[f.inputs[0]], None, _saved(run, f), curve, moved)
    return Epilogue(end, _finish(f, "tangent_backward", f.adds[0]))


def _alone(run: Pass, node: Node, source: Buffer, epilogue: Epilogue) -> None:
    size = run.tasks * run.elements(node.output)
    run.emit(apply, blocks(size, FLAT), source=source, size=size, BLOCK=FLAT, **epilogue._asdict())


def forward(run: Pass, node: Node) -> None:
    """y = f(x), unless the layer before has done it."""
    if not node.in_forward:
        end = End(run.x[node.output], None, None, None, None)
        _alone(run, node, run.x[node.inputs[0]], Epilogue(end, _finish(node, "forward")))


def backward(run: Pass, node: Node, sinks: Sinks | None) -> None:
    """dx = dy f'(x), unless the layer after has done it."""
    if not node.in_backward and run.wants_delta(node.inputs[0]):
        _alone(run, node, run.d[node.output], _function_backward(run, node))


def tangent(run: Pass, node: Node) -> None:
    """ry = rx f'(x), unless the layer before has done it."""
    if not node.in_forward:
        end = End(run.rx[node.output], None, _saved(run, node), None, None)
        _alone(run, node, run.rx[node.inputs[0]], Epilogue(end, _finish(node, "tangent")))


def tangent_backward(run: Pass, node: Node, sinks: Sinks | None) -> None:
    """rdx = rdy f'(x) + dy f''(x) rx, unless the layer after has done it."""
    if not node.in_backward and run.wants_delta(node.inputs[0]):
        _alone(run, node, run.rd[node.output], _function_tangent_backward(run, node))
