"""The C++ engine; `fastmeta.backends.cpu` is its only user. See csrc/bindings.cpp."""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

MOST_THREADS: int
NARROW_ROWS: int

class Plan:
    """A network, its shapes and the memory they take."""

    def __init__(
        self,
        is_double: bool,
        values: Sequence[Any],
        layers: Sequence[Any],
        params: Sequence[Any],
        output: int,
        options: Mapping[str, Any],
    ) -> None: ...
    def run(
        self,
        tasks: int,
        threads: int,
        data: list[Tensor | None],
        rate: list[Tensor | None],
        adapted_grad: list[Tensor | None],
        adapted: list[Tensor | None],
        grad: list[Tensor | None],
        grad_offsets: Sequence[int],
        rate_grad: list[Tensor | None],
        support: list[Tensor | None],
        query: list[Tensor | None],
        others: list[Tensor | None],
        step_weights: Sequence[float],
        poison: bool,
    ) -> int: ...
    @property
    def workspace_bytes(self) -> int: ...
    @property
    def parameter_set_bytes(self) -> int: ...

def kinds() -> dict[str, tuple[int, int, int, int, int]]: ...
def functions() -> list[str]: ...
def instruction_set() -> str: ...
def instruction_sets() -> list[str]: ...
def last_run_seconds() -> float: ...
def scratch_bytes() -> int: ...
def release_scratch() -> None: ...
def elementary(
    name: str,
    order: int,
    is_double: bool,
    constants: Sequence[float],
    inputs: list[Tensor],
    output: Tensor,
) -> None: ...
def fma_peak(dtype: str, threads: int) -> float: ...
def cache_bandwidth(bytes: int, threads: int) -> float: ...
