"""A step program: instructions in stages, with their memory planned."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

from fastmeta.trace.builder import Builder
from fastmeta.trace.ir import Buffer, Instruction, Map, Operand, Product, Space, View
from fastmeta.trace.passes.copies import without_copies
from fastmeta.trace.passes.epilogues import with_epilogues
from fastmeta.trace.passes.fuse import fused, stages_of
from fastmeta.trace.passes.place import constants_of, placed, rounded
from fastmeta.trace.passes.products import in_rows
from fastmeta.trace.passes.slices import in_slices
from fastmeta.trace.passes.sums import with_accumulation
from fastmeta.trace.passes.tables import Few, Index, Numbered, tables_of, with_few_rows
from fastmeta.trace.passes.uses import alive
from fastmeta.trace.record import contiguous, numel


@dataclass(frozen=True, slots=True)
class StepProgram:
    """What the machine runs.

    Args:
        stages: what depends on neither theta nor the direction; on theta; on the direction.
        places: of all buffers.
        sizes: elements of every space.
        constants: their elements, [sizes[CONST]].
        tables: parameters that it reads by rows only, by their places in THETA.
        numbered: the indices that it needs as those of small tables.
    """

    stages: tuple[tuple[Instruction, ...], ...]
    places: Mapping[Buffer, tuple[Space, int]]
    sizes: Mapping[Space, int]
    constants: tuple[float, ...]
    tables: Mapping[int, set[Index]]
    numbered: Sequence[Numbered]

    @property
    def instructions(self) -> tuple[Instruction, ...]:
        """All of them, in order."""
        return tuple(step for stage in self.stages for step in stage)

    def multiply_adds(self) -> tuple[int, int, int]:
        """Of the products of each stage, for one task."""
        found = [
            sum(numel(s.out.shape) * _depth(s) for s in stage if isinstance(s, Product))
            for stage in self.stages
        ]
        return tuple(found + [0] * (3 - len(found)))  # type: ignore[return-value]


def _depth(product: Product) -> int:
    return product.a.shape[-1] + (0 if product.more is None else product.more[0].shape[-1])


@dataclass(frozen=True, slots=True)
class Result:
    """Something that a program leaves in a space of results."""

    operand: Operand
    shape: tuple[int, ...]
    space: Space
    offset: int


def finished(
    build: Builder,
    results: Sequence[Result],
    inputs: Mapping[Space, int],
    last_stage: int,
    rows: bool,
    shapes: Mapping[int, tuple[int, ...]] = MappingProxyType({}),
    few: Few | None = None,
) -> StepProgram:
    """The program that computes these results.

    Args:
        build: holds the instructions.
        results: what is wanted.
        inputs: sizes of the spaces that are given.
        last_stage: of what has no direction: 1.
        rows: for one task at a time: right factors of products in rows.
        shapes: of the adapted parameters, by their places in THETA.
        few: which of them are small tables; None: none.
    """
    sizes = dict(inputs)
    targets: dict[tuple[Space, int], Buffer] = {}
    for result in results:
        n = numel(result.shape)
        buffer = targets.setdefault((result.space, result.offset), Buffer(n, result.space, result.offset))
        at = View(buffer, 0, result.shape, contiguous(result.shape))
        operand = result.operand
        build.emit(Map(at, "copy", (operand.expand(result.shape) if isinstance(operand, View) else operand,)))
        sizes[result.space] = max(sizes.get(result.space, 0), result.offset + rounded(n))
    steps = alive(build.instructions)
    tables, numbered = tables_of(steps, shapes), list[Numbered]()
    if few is not None:
        steps, numbered = with_few_rows(steps, few, shapes, sizes)
    steps = without_copies(steps)
    steps = with_accumulation(steps)
    steps = without_copies(steps)
    steps = in_slices(steps)
    steps = alive(steps)
    if rows:
        steps = in_rows(steps)
    stages = stages_of(steps, last_stage)
    steps = with_epilogues(steps, rows, stages)
    steps = fused(steps, stages)
    grouped = [[s for s in steps if stages[s.out.buffer] == stage] for stage in range(last_stage + 1)]
    constants = constants_of(steps)
    planned, spaces = placed(grouped, sizes)
    places = planned | {buffer: (Space.CONST, offset) for buffer, offset in constants.items()}
    values = [0.0] * max((offset + rounded(b.size) + 16 for b, offset in constants.items()), default=0)
    for buffer, offset in constants.items():
        if buffer.constant is not None:
            values[offset : offset + buffer.size] = buffer.constant.double().tolist()
    spaces[Space.CONST] = len(values)
    return StepProgram(tuple(map(tuple, grouped)), places, spaces, tuple(values), tables, numbered)
