"""What operators PyTorch runs for one task, noted as they run.

Below autograd every tensor is a strided view of a storage. So views are no operators here: an
operator reads and writes views of values, and a value is all that a storage holds until it is
written to again. What depends on nothing that was registered is a constant, and was computed while
it was noted.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

aten = torch.ops.aten


class UntraceableError(Exception):
    """Why a module has no step program."""


@dataclass(eq=False, slots=True)
class Value:
    """What a storage holds from one write to the next.

    Args:
        size: in elements.
        constant: its elements, [size], where it depends on nothing that was registered.
        name: of a registered input, else "".
        maker: what computes it; None for inputs and constants.
    """

    size: int
    dtype: torch.dtype
    constant: Tensor | None = None
    name: str = ""
    maker: Call | None = None

    @property
    def traced(self) -> bool:
        """Whether it depends on what was registered."""
        return self.constant is None


@dataclass(frozen=True, slots=True)
class Ref:
    """A tensor: a strided view of a value."""

    value: Value
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: torch.dtype

    @property
    def numel(self) -> int:
        """How many elements it has."""
        return numel(self.shape)

    def tensor(self) -> Tensor:
        """The same view of a constant."""
        if self.value.constant is None:
            raise ValueError("the value is no constant")
        return self.value.constant.as_strided(self.shape, self.strides, self.offset)


@dataclass(eq=False, slots=True)
class Call:
    """One operator: its arguments with a `Ref` for each tensor, and what it returns."""

    function: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    outs: list[Ref | None] = field(default_factory=list)

    def refs(self) -> Iterator[Ref]:
        """The tensors that it reads."""
        return refs_in((self.args, tuple(self.kwargs.values())))


#: The functional form of writing `source` into a view of `base`: ASSIGN(base, view, source).
ASSIGN = "assign"
_FRESH = frozenset({aten.lift_fresh.default, aten.lift_fresh_copy.default, aten.lift.default})
_HOST_READS = frozenset({aten._local_scalar_dense.default, aten.equal.default, aten.is_nonzero.default})
#: Operators that write what they are given.
_WRITES = frozenset({aten.copy_.default, aten.zero_.default, aten.fill_.Scalar, aten.fill_.Tensor})


_INDEXED = frozenset(
    {
        aten.index.Tensor,
        aten._unsafe_index.Tensor,
        aten.index_put.default,
        aten.index_put_.default,
        aten._index_put_impl_.default,
        aten._unsafe_index_put.default,
    }
)


@cache
def _decompositions() -> dict[Any, Callable[..., Any]]:
    """PyTorch's own, of operators into others."""
    from torch._decomp import decomposition_table

    return dict(decomposition_table)


@cache
def _composite(function: Any) -> bool:
    """Whether PyTorch makes an operator out of others before it gets to a backend."""
    return bool(torch._C._dispatch_has_kernel_for_dispatch_key(function.name(), "CompositeImplicitAutograd"))


def name_of(function: Any) -> str:
    """An operator's name: "mul.Tensor", "mm"."""
    return str(function).removeprefix("aten.").removesuffix(".default")


def contiguous(shape: Sequence[int]) -> tuple[int, ...]:
    """Strides of a dense tensor, the last dimension fastest."""
    strides, n = [], 1
    for size in reversed(shape):
        strides.append(n)
        n *= max(size, 1)
    return tuple(reversed(strides))


def numel(shape: Sequence[int]) -> int:
    """Elements of a shape."""
    n = 1
    for size in shape:
        n *= size
    return n


def refs_in(argument: Any) -> Iterator[Ref]:
    """Every `Ref` in a tree of lists, tuples and dicts."""
    if isinstance(argument, Ref):
        yield argument
    elif isinstance(argument, (list, tuple)):
        for item in argument:
            yield from refs_in(item)
    elif isinstance(argument, dict):
        yield from refs_in(tuple(argument.values()))


def _mapped(argument: Any, function: Callable[[Tensor], Any]) -> Any:
    if isinstance(argument, Tensor):
        return function(argument)
    if isinstance(argument, (list, tuple)):
        return [_mapped(item, function) for item in argument]
    return argument


def _tensors(argument: Any) -> Iterator[Tensor]:
    if isinstance(argument, Tensor):
        yield argument
    elif isinstance(argument, (list, tuple)):
        for item in argument:
            yield from _tensors(item)
    elif isinstance(argument, dict):
        yield from _tensors(tuple(argument.values()))


class Recorder(TorchDispatchMode):
    """Notes every operator that runs inside it.

    To be entered with gradients on; the tensors that a program depends on are registered first.

    Args:
        supported: names of operators, as of `name_of`; others are noted as what PyTorch decomposes
            them into, where it does.

    Raises (inside):
        UntraceableError: what runs cannot be a program: it reads a value on the host, draws random
            numbers, reads a tensor from outside, or its shapes depend on values.
    """

    def __init__(self, supported: Container[str] = frozenset()) -> None:
        super().__init__()
        self._supported = supported
        self._values: dict[int, Value] = {}  # by storage: what it holds now
        self._alive: list[Any] = []  # storages whose addresses must not be used again

    def register(self, tensor: Tensor, name: str) -> None:
        """Make `tensor`, dense, an input of the program."""
        self._set(tensor, Value(tensor.numel(), tensor.dtype, name=name))

    def ref(self, tensor: Tensor) -> Ref:
        """Where a tensor comes from.

        Raises:
            UntraceableError: from outside.
        """
        value = self._values.get(_key(tensor))
        if value is None:
            raise UntraceableError(
                f"it reads a tensor {tuple(tensor.shape)} that is none of its arguments, parameters or "
                "buffers"
            )
        return Ref(
            value, int(tensor.storage_offset()), tuple(tensor.shape), tuple(tensor.stride()), tensor.dtype
        )

    def value_of(self, tensor: Tensor) -> Value | None:
        """What its storage holds now; None for a tensor from outside."""
        return self._values.get(_key(tensor))

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in _FRESH:
            out = func(*args, **kwargs)
            if _key(args[0]) in self._values:
                self._note(aten.clone.default, (self.ref(args[0]),), {}, out)
            else:
                self._set(out, _constant(out))
            return out
        if func in _INDEXED:
            args = (args[0], self._without_masks(args[1]), *args[2:])
        given = list(_tensors((args, kwargs)))
        refs = {id(tensor): self.ref(tensor) for tensor in given}
        traced = any(ref.value.traced for ref in refs.values())
        if torch.Tag.nondeterministic_seeded in func.tags:
            raise UntraceableError(f"it draws random numbers ({func})")
        if traced and func in _HOST_READS:
            raise UntraceableError("its code reads a value of a tensor that depends on parameters or inputs")
        if traced and torch.Tag.data_dependent_output in func.tags:
            raise UntraceableError(f"the result of {func} is read by its code")
        if traced and torch.Tag.dynamic_output_shape in func.tags and func not in _INDEXED:
            raise UntraceableError(f"the shape of what {func} returns depends on values")
        if func._schema.is_mutable:
            return self._write(func, args, kwargs, refs)
        if traced and name_of(func) not in self._supported:
            with self:
                found = func.decompose(*args, **kwargs) if _composite(func) else NotImplemented
                if found is NotImplemented and func in _decompositions():
                    found = _decompositions()[func](*args, **kwargs)
            if found is not NotImplemented:
                return found
        out = func(*args, **kwargs)
        outs = list(_tensors(out))
        if all(_key(o) in self._values for o in outs):  # views
            self._alive += outs
            return out
        if not traced:
            for o in outs:
                if _key(o) not in self._values:
                    self._set(o, _constant(o))
            return out
        self._note(func, _mapped(list(args), lambda t: refs[id(t)]), _mapped_dict(kwargs, refs), out)
        return out

    def _without_masks(self, indices: Sequence[Tensor | None]) -> list[Tensor | None]:
        """Constant masks among the indices as the places that they select."""
        found: list[Tensor | None] = []
        for index in indices:
            if index is None or index.dtype != torch.bool:
                found.append(index)
                continue
            if self.ref(index).value.traced:
                raise UntraceableError("the shape of what a mask selects depends on values")
            for places in index.nonzero().unbind(1):
                own = places.clone()
                self._set(own, _constant(own))
                found.append(own)
        return found

    def _note(self, func: Any, args: Sequence[Any], kwargs: dict[str, Any], out: Any) -> None:
        call = Call(func, tuple(args), kwargs)
        for o in [out] if isinstance(out, Tensor) else out:
            if not isinstance(o, Tensor):
                call.outs.append(None)
                continue
            if _key(o) not in self._values:
                self._set(o, Value(_elements(o), o.dtype, maker=call))
            call.outs.append(self.ref(o))

    def _write(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], refs: dict[int, Ref]) -> Any:
        to = args[0]
        written = [a for a in func._schema.arguments if a.alias_info is not None and a.alias_info.is_write]
        if len(written) != 1 or written[0] is not func._schema.arguments[0] or not isinstance(to, Tensor):
            raise UntraceableError(f"it writes by {func}")
        before = refs[id(to)]
        if before.value.constant is not None:  # it stays what it was for what has read it
            before.value.constant = before.value.constant.clone()
        out = func(*args, **kwargs)
        if all(not ref.value.traced for ref in refs.values()):
            self._set(to, _constant(to))
            return out
        if func in _WRITES:
            written_by = args[1] if len(args) > 1 else 0.0
            source: Any = refs[id(written_by)] if isinstance(written_by, Tensor) else float(written_by)
            kinds = {written_by.dtype} if isinstance(written_by, Tensor) else set()
            if not to.dtype.is_floating_point and kinds - {to.dtype, torch.bool}:
                raise UntraceableError(f"it writes a tensor of {kinds.pop()} into one of {to.dtype}")
        else:
            functional = _functional(func)
            call = Call(
                functional, tuple(_mapped(list(args), lambda t: refs[id(t)])), _mapped_dict(kwargs, refs)
            )
            value = Value(before.numel, to.dtype, maker=call)
            source = Ref(value, 0, before.shape, contiguous(before.shape), to.dtype)
            call.outs.append(source)
        assign = Call(ASSIGN, (before.value, before, source), {})
        after = Value(before.value.size, before.value.dtype, maker=assign)
        assign.outs.append(Ref(after, 0, (after.size,), (1,), after.dtype))
        self._values[_key(to)] = after
        return out

    def _set(self, tensor: Tensor, value: Value) -> None:
        self._values[_key(tensor)] = value
        self._alive.append(tensor)


#: What gives values of a tensor to Python.
_READS = frozenset(
    getattr(Tensor, name)
    for name in ("item", "tolist", "numpy", "__array__", "__bool__", "__int__", "__float__", "__index__")
)


class NoReads(TorchFunctionMode):
    """Refuses code that reads values of tensors which may be others at the next call.

    Args:
        recorder: knows the tensors that the code has made itself.
    """

    def __init__(self, recorder: Recorder) -> None:
        super().__init__()
        self._recorder = recorder

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func in _READS:
            value = self._recorder.value_of(args[0])
            if value is None or value.traced:
                raise UntraceableError(f"its code reads a value of a tensor (`Tensor.{func.__name__}`)")
        return func(*args, **(kwargs or {}))


def _key(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


def _elements(tensor: Tensor) -> int:
    return tensor.untyped_storage().nbytes() // tensor.element_size()


def _constant(tensor: Tensor) -> Value:
    flat = torch.empty(0, dtype=tensor.dtype, device=tensor.device).set_(tensor.untyped_storage())
    return Value(flat.numel(), tensor.dtype, flat)


def _mapped_dict(kwargs: dict[str, Any], refs: dict[int, Ref]) -> dict[str, Any]:
    return {name: _mapped(value, lambda t: refs[id(t)]) for name, value in kwargs.items()}


def _functional(func: Any) -> Any:
    """The operator that returns what this one writes."""
    name, _, overload = str(func).removeprefix("aten.").partition(".")
    plain = {"_index_put_impl_": "index_put"}.get(name, name.rstrip("_"))
    packet = getattr(aten, plain, None)
    if packet is None or overload not in packet.overloads():
        raise UntraceableError(f"it writes by {func}")
    return getattr(packet, overload)
