"""The C++ engines, and how plans are found quickly. Users: the backends `cpu` and `machine`, and
`fastmeta.ordinary`. See csrc/bindings.cpp."""

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

class Machine:
    """Traced programs, and how much memory they take."""

    def __init__(self, description: Mapping[str, Any]) -> None: ...
    def run(
        self,
        tasks: int,
        threads: int,
        data: Sequence[Tensor | None],
        rate: Sequence[Tensor | None],
        adapted_grad: Sequence[Tensor | None],
        adapted: Sequence[Tensor | None],
        grad: Sequence[Tensor | None],
        rate_grad: Sequence[Tensor | None],
        fixed: Sequence[Tensor | None],
        fixed_grad: Sequence[Tensor | None],
        support: Sequence[Tensor | None],
        support_grad: Sequence[Tensor | None],
        query: Sequence[Tensor | None],
        query_grad: Sequence[Tensor | None],
        others: Sequence[Tensor | None],
        step_weights: Sequence[float],
        poison: bool,
    ) -> int: ...
    @property
    def workspace_bytes(self) -> int: ...

def sorts(tensors: list[Any]) -> bytes | None: ...
def rule_numbers() -> list[str]: ...
def machine_functions() -> list[str]: ...
def machine_lanes(is_double: bool) -> int: ...
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
