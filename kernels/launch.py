"""Launches, written down once and run any number of times."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import triton.language as tl

from fastmeta.kernels.jit import jit, varies


@jit
@varies("size")
def fill(
    out,  # [size]
    size,
    BLOCK: tl.constexpr,
):
    """out = 0."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out + at, tl.zeros([BLOCK], out.dtype.element_ty), mask=at < size)


@dataclass(frozen=True, slots=True)
class Choice:
    """Another way to launch a kernel, to the same bits."""

    programs: int
    warps: int
    stages: int
    tiles: tuple[tuple[str, int], ...]  # arguments by name


@dataclass(frozen=True, slots=True)
class Launch:
    """One kernel with its arguments: tensors, numbers, and NamedTuples of them.

    What is absent is None, which a kernel knows when it is compiled.
    """

    kernel: Any
    programs: int
    arguments: dict[str, Any]
    warps: int
    stages: int
    choices: tuple[Choice, ...] = ()
    work: int = 0  # multiply-adds, where there is something to choose
    # a thread may have; None: the assembler weighs them against blocks side by side
    registers: int | None = None

    def run(self) -> Any:
        """Launch it on the current stream; what was compiled, if it was."""
        return self.kernel[(self.programs,)](**self.arguments, **self.options)

    def values(self) -> dict[str, Any]:
        """The arguments by name, the members of NamedTuples too: "end.out"."""
        return dict(named(self.arguments))

    def chosen(self, choice: Choice) -> Launch:
        """The same launched in another way."""
        arguments = {**self.arguments, **dict(choice.tiles)}
        return replace(
            self,
            programs=choice.programs,
            warps=choice.warps,
            stages=choice.stages,
            arguments=arguments,
            choices=(),
        )

    @property
    def options(self) -> dict[str, Any]:
        """What the compiler is told; multiply-adds are fused by name, since Triton's default is
        about to change."""
        told = {"num_warps": self.warps, "num_stages": self.stages, "enable_fp_fusion": True}
        return told if self.registers is None else told | {"maxnreg": self.registers}


@dataclass(slots=True)
class Recorder:
    """A list of launches under construction."""

    launches: list[Launch] = field(default_factory=list)

    def __call__(
        self,
        kernel: Any,
        programs: int,
        *,
        warps: int = 4,
        stages: int = 1,
        choices: tuple[Choice, ...] = (),
        work: int = 0,
        registers: int | None = None,
        **arguments: Any,
    ) -> None:
        """Write down a launch of `programs` programs, none at all if that is zero."""
        if programs:
            self.launches.append(Launch(kernel, programs, arguments, warps, stages, choices, work, registers))

    def zero(self, tensor: torch.Tensor) -> None:
        """Write down that a tensor is filled with zeros."""
        self(fill, blocks(tensor.numel(), FLAT), out=tensor, size=tensor.numel(), BLOCK=FLAT)


def named(arguments: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Arguments by name, with the members of NamedTuples in their place: "end.out"."""
    for name, value in arguments.items():
        if isinstance(value, tuple):
            yield from named({f"{name}.{member}": own for member, own in value._asdict().items()})  # type: ignore[attr-defined]
        else:
            yield name, value


#: Registers that a thread can have. Asked for them, the assembler does not spill to make room for
#: more blocks: for kernels of one program a task, of which a multiprocessor has few.
REGISTERS = 255

#: Of a tile of outputs that a loss looks at: of more, not all that is computed would go into
#: registers.
LOSS_BYTES = 4096

#: Elements that a program of a flat kernel handles.
FLAT = 1024


def blocks(size: int, block: int) -> int:
    """How many blocks cover `size`."""
    return -(-size // block)


def tiny(like: torch.Tensor) -> float:
    """The smallest normal number: weights below it count as zero."""
    return torch.finfo(like.dtype).tiny


def power(size: int, least: int, most: int) -> int:
    """The smallest power of two from `least` to `most` that is at least `size`, or `most`."""
    found = least
    while found < size and found < most:
        found *= 2
    return found
