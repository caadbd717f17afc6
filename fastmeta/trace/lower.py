"""From what was recorded to instructions: `Lowering` walks the operators that matter and asks the
table for each. An operator that is missing is one function in `fastmeta/trace/operators`, with its
names in `@lowers`; see docs/machine.md.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch

from fastmeta.trace.builder import Builder, Piece, Sparse
from fastmeta.trace.ir import Buffer, Map, Operand, View
from fastmeta.trace.record import (
    ASSIGN,
    Call,
    Ref,
    UntraceableError,
    Value,
    contiguous,
    name_of,
    numel,
)

#: Operator, as "mul.Tensor" -> what makes its instructions.
OPERATORS: dict[str, Callable[..., Any]] = {}


def lowers(*names: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Enter a function into the table.

    It is called with the `Lowering` and the operator's arguments, with a `View` for a tensor, or a
    number for a constant of equal elements; it returns a view, a `Sparse`, or a list of these.
    """

    def enter(function: Callable[..., Any]) -> Callable[..., Any]:
        for name in names:
            OPERATORS[name] = function
        return function

    return enter


class Lowering:
    """One program in the making.

    Args:
        dtype: what it computes in, float32 or float64.
        inputs: registered name -> the buffer that it is, and where in that it begins.
    """

    def __init__(self, dtype: torch.dtype, inputs: Mapping[str, tuple[Buffer, int]]) -> None:
        self.build = Builder(dtype)
        self.dtype = dtype
        self._inputs = inputs
        self._known: dict[Value, tuple[Buffer, int] | Sparse] = {}
        self.call: Call | None = None  # the one that is lowered now

    def run(self, wanted: Iterable[Ref]) -> list[Operand]:
        """Instructions for these and all that they depend on; where they are afterwards.

        Raises:
            UntraceableError: an operator has no lowering.
        """
        wanted = list(wanted)
        for call in _in_order(ref.value for ref in wanted):
            self.call = call
            self._lower(call)
        return [self.operand(ref) for ref in wanted]

    # What lowerings ask for

    @property
    def strides(self) -> tuple[int, ...] | None:
        """How PyTorch lays out the first result of the operator at hand."""
        out = self.call.outs[0] if self.call is not None else None
        return None if out is None else out.strides

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the first result."""
        out = self.call.outs[0] if self.call is not None else None
        return () if out is None else out.shape

    def operand(self, ref: Ref) -> Operand:
        """A tensor, in memory or as the number that all of its elements are."""
        value = ref.value
        if value.constant is not None:
            return self.build.constant(self._checked(ref))
        buffer, offset = self._memory(value)
        return View(buffer, offset + ref.offset, ref.shape, ref.strides)

    def sparse(self, ref: Ref) -> Sparse | None:
        """The pieces of a tensor that is all of a sum of pieces."""
        found = self._known.get(ref.value)
        if isinstance(found, Sparse) and ref.offset == 0 and numel(ref.shape) == found.size:
            return found if ref.strides == contiguous(ref.shape) else None
        return None

    def map(self, function: str, *args: Operand) -> Operand:
        """`Builder.map` to the shape and layout of the operator's result."""
        if not any(isinstance(a, View) for a in args):  # numbers alone
            return (
                self.build.copy(args[0], self.shape) if function == "copy" else self._numbers(function, args)
            )
        strides = self.strides
        if strides is not None and not _dense_in_some_order(self.shape, strides):
            strides = None
        return self.build.map(function, *args, shape=self.shape, strides=strides)

    def view(self, operand: Operand, shape: Iterable[int]) -> View:
        """An operand in memory, whatever it is."""
        if isinstance(operand, View):
            return operand
        return self.build.array(torch.full((), operand, dtype=torch.float64)).expand(tuple(shape))

    # The rest is its own

    def _numbers(self, function: str, args: tuple[Operand, ...]) -> View:
        views = [self.build.array(torch.full((), float(args[0]), dtype=torch.float64))]  # type: ignore[arg-type]
        return self.build.map(function, *views, *args[1:], shape=self.shape)

    def _checked(self, ref: Ref) -> torch.Tensor:
        tensor = ref.tensor()
        integers = not tensor.is_floating_point() and not tensor.is_complex() and tensor.numel() > 0
        if integers and self.dtype == torch.float32 and int(tensor.to(torch.int64).abs().max()) > 1 << 24:
            raise UntraceableError("it uses an integer constant above 2^24 in float32")
        if tensor.is_complex():
            raise UntraceableError("it computes with complex numbers")
        return tensor

    def _memory(self, value: Value) -> tuple[Buffer, int]:
        found = self._known.get(value)
        if found is None:
            if not value.name:
                raise UntraceableError("a value is used before it is made")
            found = self._known[value] = self._inputs[value.name]
        if isinstance(found, Sparse):
            found = self._known[value] = (self.build.assembled(found).buffer, 0)
        return found

    def _lower(self, call: Call) -> None:
        if call.function is ASSIGN:
            self._known[call.outs[0].value] = self._assigned(*call.args)  # type: ignore[union-attr]
            return
        name = name_of(call.function)
        lowering = OPERATORS.get(name)
        if lowering is None:
            raise UntraceableError(f"the operator {call.function} has no lowering")
        for out in call.outs:
            if out is not None and (out.dtype.is_complex or _other_float(out.dtype, self.dtype)):
                raise UntraceableError(f"{call.function} returns {out.dtype}, in a program of {self.dtype}")
        raw = getattr(lowering, "raw", False)
        args = call.args if raw else self._operands(call.args)
        kwargs = call.kwargs if raw else {key: self._operands(v) for key, v in call.kwargs.items()}
        found = lowering(self, *args, **kwargs)
        for out, result in zip(call.outs, found if isinstance(found, list) else [found], strict=False):
            if out is not None and result is not None and out.value.maker is call:
                self._bind(out, result)

    def _operands(self, argument: Any) -> Any:
        if isinstance(argument, Ref):
            return self.operand(argument)
        if isinstance(argument, (list, tuple)):
            return [self._operands(item) for item in argument]
        return argument

    def _bind(self, out: Ref, result: Operand | Sparse) -> None:
        """A value is where a lowering has put it, or gets a copy that lies as PyTorch's."""
        if isinstance(result, Sparse):
            if out.strides == contiguous(out.shape) and out.value.size == result.size:
                self._known[out.value] = result
                return
            whole = self.build.assembled(result)
            result = View(whole.buffer, 0, out.shape, contiguous(out.shape))
        if isinstance(result, View) and result.shape != out.shape:
            result = self.build.reshape(result, out.shape)
        same = isinstance(result, View) and all(
            n == 1 or s == t for n, s, t in zip(out.shape, result.strides, out.strides, strict=True)
        )
        if same and isinstance(result, View) and out.offset == 0 and out.value.size == out.numel:
            self._known[out.value] = (result.buffer, result.offset)
            return
        whole = self.build.new((out.value.size,))
        at = View(whole.buffer, out.offset, out.shape, out.strides)
        self.build.emit(Map(at, "copy", (result.expand(out.shape) if isinstance(result, View) else result,)))
        self._known[out.value] = (whole.buffer, 0)

    def _assigned(self, before: Value, at: Ref, source: Any) -> tuple[Buffer, int] | Sparse:
        """What a storage holds after `source` was written into a view of it."""
        content = self.operand(source) if isinstance(source, Ref) else float(source)
        view = content.expand(at.shape) if isinstance(content, View) else self.view(content, at.shape)
        whole = at.numel == before.size and at.offset == 0 and at.strides == contiguous(at.shape)
        if isinstance(content, View) and whole and view.dense:
            return view.buffer, view.offset
        old = self.operand(Ref(before, 0, (before.size,), (1,), before.dtype))
        copied = self.build.copy(old, (before.size,))
        self.build.emit(Map(View(copied.buffer, at.offset, at.shape, at.strides), "copy", (view,)))
        return copied.buffer, 0


def raw(function: Callable[..., Any]) -> Callable[..., Any]:
    """Mark a lowering that is given `Ref`s themselves."""
    function.raw = True  # type: ignore[attr-defined]
    return function


def piece_of(x: View, like: View) -> Piece:
    """`x` as a piece that lies where `like` does."""
    return Piece(like.offset, like.shape, like.strides, x)


def _other_float(dtype: torch.dtype, own: torch.dtype) -> bool:
    return dtype.is_floating_point and dtype != own


def _dense_in_some_order(shape: tuple[int, ...], strides: tuple[int, ...]) -> bool:
    want = 1
    for s, n in sorted((s, n) for s, n in zip(strides, shape, strict=True) if n != 1):
        if s != want:
            return False
        want *= n
    return True


def _in_order(values: Iterable[Value]) -> list[Call]:
    """The calls that make these values, each after those that it reads."""
    order: list[Call] = []
    state: dict[Call, bool] = {}
    stack = [v.maker for v in values if v.maker is not None]
    while stack:
        call = stack[-1]
        if state.get(call):
            stack.pop()
            continue
        if call in state:
            state[call] = True
            order.append(call)
            stack.pop()
            continue
        state[call] = False
        read = [ref.value for ref in call.refs()]
        if call.function is ASSIGN:
            read.append(call.args[0])
        stack += [v.maker for v in read if v.maker is not None and v.maker not in state]
    return order
