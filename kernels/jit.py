"""`@jit`, the mark of what Triton compiles: kernels and what they call.

Triton reads such a function as a program of its own, in which names mean blocks of numbers. mypy,
which would read it as Python, leaves it out.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

__all__ = ["jit", "varies"]

Function = TypeVar("Function", bound=Callable[..., Any])

if TYPE_CHECKING:
    from typing import no_type_check as jit
else:
    import triton

    def jit(function):
        """Have Triton compile a function."""
        return triton.jit(function, do_not_specialize=getattr(function, "varies", ()))


def varies(*names: str) -> Callable[[Function], Function]:
    """Below `@jit`: the whole numbers of which Triton compiles one kernel for all values.

    Of other ones it compiles kernels of their own where they are 1, and where they are multiples of
    16; of members of NamedTuples always.
    """

    def marked(function: Function) -> Function:
        function.varies = names  # type: ignore[attr-defined]
        return function

    return marked
