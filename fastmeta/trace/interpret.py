"""Step programs in plain PyTorch: what the machine is checked against."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from fastmeta.trace.ir import (
    Buffer,
    Fused,
    Gather,
    Instruction,
    Map,
    Operand,
    Product,
    Reduce,
    Scatter,
    View,
)

#: The machine's element-wise functions.
FUNCTIONS: dict[str, Callable[..., Tensor]] = {
    "copy": lambda a: a,
    "add": torch.add,
    "sub": torch.sub,
    "mul": torch.mul,
    "div": torch.div,
    "max": torch.maximum,
    "min": torch.minimum,
    "pow": torch.pow,
    "atan2": torch.atan2,
    "lt": lambda a, b: a < b,
    "le": lambda a, b: a <= b,
    "eq": lambda a, b: a == b,
    "ne": lambda a, b: a != b,
    "where": lambda c, a, b: torch.where(c != 0, a, b),
    "gate": lambda a, b: torch.where(a <= 0, 0.0, b),
    **{
        name: getattr(torch, name)
        for name in (
            "neg",
            "abs",
            "relu",
            "tanh",
            "sigmoid",
            "exp",
            "expm1",
            "log",
            "log1p",
            "sqrt",
            "sin",
            "cos",
            "erf",
            "sign",
            "floor",
            "ceil",
            "round",
            "trunc",
        )
    },
}


def interpret(
    instructions: Sequence[Instruction], memory: Mapping[Buffer, Tensor], dtype: torch.dtype
) -> dict[Buffer, Tensor]:
    """Run a program of one task.

    Args:
        instructions: in order.
        memory: buffers that are given, [size] each; what they hold may be changed.
        dtype: of the others.

    Returns:
        What all buffers hold at the end.
    """
    held = dict(memory)

    def at(view: View) -> Tensor:
        tensor = held.get(view.buffer)
        if tensor is None:
            constant = view.buffer.constant
            tensor = held[view.buffer] = (
                torch.full((view.buffer.size,), torch.nan, dtype=dtype)
                if constant is None
                else constant.to(dtype)
            )
        if min(view.strides, default=0) >= 0:
            return tensor.as_strided(view.shape, view.strides, tensor.storage_offset() + view.offset)
        grids = torch.meshgrid(*[torch.arange(n) for n in view.shape], indexing="ij")
        index = sum(
            (g * s for g, s in zip(grids, view.strides, strict=True)), torch.zeros((), dtype=torch.int64)
        )
        return tensor[index + view.offset]

    def value(operand: Operand) -> Tensor:
        if isinstance(operand, View):
            tensor = at(operand)
            return tensor if tensor.is_floating_point() else tensor.to(dtype)
        return torch.tensor(operand, dtype=dtype)

    for step in instructions:
        _run(step, at, value)
    return held


def _run(step: Instruction, at: Callable[[View], Tensor], value: Callable[[Operand], Any]) -> None:
    if isinstance(step, Fused):
        for m in step.maps:
            _run(m, at, value)
    elif isinstance(step, Map):
        found = FUNCTIONS[step.function](*map(value, step.args))
        at(step.out).copy_(found.to(at(step.out).dtype))
    elif isinstance(step, Reduce):
        x = value(step.x)
        dims = list(range(len(step.out.shape), len(step.x.shape)))
        if step.function == "sum":
            found = x.sum(dims) if dims else x
        elif step.function == "max":
            found = x.amax(dims) if dims else x
        else:
            found = _place(x, step).to(x.dtype)
        at(step.out).copy_(at(step.out) + found if step.accumulate else found)
    elif isinstance(step, Product):
        found = value(step.a) @ value(step.b)
        if step.more is not None:
            found = found + value(step.more[0]) @ value(step.more[1])
        found = found if step.start is None else found + value(step.start)
        found = at(step.out) + found if step.accumulate else found
        found = found if step.gate is None else FUNCTIONS["gate"](value(step.gate), found)
        at(step.out).copy_(found.relu() if step.relu else found)
    elif isinstance(step, (Gather, Scatter)):
        index = value(step.index).to(torch.int64)
        index = torch.where(index < 0, index + step.limit, index) if step.wraps else index
        if index.numel() and not bool(((index >= 0) & (index < step.limit)).all()):
            raise IndexError("an index is out of range")
        moving = step.source if isinstance(step, Gather) else step.out
        places = _addresses(moving) + index * step.step
        size = moving.buffer.size
        flat = at(View(moving.buffer, 0, (size,), (1,)))
        if isinstance(step, Gather):
            found = flat[places]
            at(step.out).copy_(found.to(at(step.out).dtype))
        else:
            flat.index_put_((places.reshape(-1),), value(step.source).reshape(-1), step.accumulate)


def _addresses(view: View) -> Tensor:
    return torch.arange(view.buffer.size).as_strided(view.shape, view.strides, view.offset)


def _place(x: Tensor, step: Reduce) -> Tensor:
    kept = len(step.out.shape)
    flat = x.reshape(*x.shape[:kept], -1)
    first = (flat == flat.amax(-1, keepdim=True)).to(torch.int8).argmax(-1)
    index = list(torch.unravel_index(first, x.shape[kept:])) if x.dim() > kept else []
    place = torch.full(x.shape[:kept], step.start)
    for d in range(kept):
        along = [1] * kept
        along[d] = -1
        place = place + torch.arange(x.shape[d]).reshape(along) * step.steps[d]
    for i, s in zip(index, step.steps[kept:], strict=True):
        place = place + i * s
    return place
