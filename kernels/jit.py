"""`@jit`, the mark of what Triton compiles: kernels and what they call.

Triton reads such a function as a program of its own, in which names mean blocks of numbers. mypy,
which would read it as Python, leaves it out.

Arguments that belong together are one NamedTuple, of two sorts:

- of tensors, numbers and None, which may hold NamedTuples: `passes.Operand`, `elementwise.End`;
- of strings, truth values and numbers that are known when a kernel is compiled, annotated
  `tl.constexpr` as a whole: `elementwise.Finish`, `windows.Window`.

Three things that Triton 3.6 does not take in a kernel, though 3.9 does:

- `x is None`, where x is a NamedTuple that has a None in it: ask one of its members;
- a NamedTuple in one of the second sort: they are flat;
- a member that is a string as the argument of a function: hand on the whole NamedTuple.

The order of a kernel's arguments is not free either: the assembler may take other registers, and
spill, after one has moved (`fastmeta.backends.triton.compile` tells).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

__all__ = ["jit", "varies"]

Function = TypeVar("Function", bound=Callable[..., Any])

if TYPE_CHECKING:
    from typing import no_type_check as jit
else:
    from inspect import signature

    import triton

    def jit(function):
        """Have Triton compile a function."""
        names = getattr(function, "varies", ())
        if unknown := set(names) - set(signature(function).parameters):
            raise TypeError(f"{function.__name__} has no arguments {unknown}")
        return triton.jit(function, do_not_specialize=names)


def varies(*names: str) -> Callable[[Function], Function]:
    """Below `@jit`: the whole numbers of which Triton compiles one kernel for all values.

    Of other ones it compiles kernels of their own where they are 1, and where they are multiples of
    16; of members of NamedTuples always.
    """

    def marked(function: Function) -> Function:
        function.varies = names  # type: ignore[attr-defined]
        return function

    return marked
