"""What was traced for one sort of problem."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from fastmeta.trace.passes.tables import Few, few_rows
from fastmeta.trace.program import StepProgram
from fastmeta.trace.step import Sources, Traced


@dataclass(frozen=True, slots=True)
class Programs:
    """What was traced for one sort of problem."""

    adapted: tuple[str, ...]
    others: tuple[str, ...]  # parameters that do not adapt
    sources: Sources
    support: Traced | None
    query: Traced | None
    lowered: dict[tuple[str, bool, bool], StepProgram]
    #: The small tables, once they are known.
    small: list[Few | None]

    def few(self, dtype: torch.dtype, rows: bool) -> Few | None:
        """The tables of which a task needs few rows, None where there are none."""
        if not self.small:
            traced = [t for t in (self.support, self.query) if t is not None]
            programs = [self.program(role, dtype, rows) for role in ("support", "query")]
            shapes = traced[0].adapted | traced[-1].adapted if traced else {}
            self.small.append(few_rows(shapes, [p.tables for p in programs if p is not None]))
        return self.small[0]

    def program(
        self, role: str, dtype: torch.dtype, rows: bool, few: Few | None = None
    ) -> StepProgram | None:
        """The step program of a set, lowered once.

        Args:
            role: "support" or "query".
            dtype: of the parameters.
            rows: as of `Traced.lowered`.
            few: what `few` says, where the machine is to have small tables.
        """
        traced = self.support if role == "support" else self.query
        if traced is None:
            return None
        key = role, rows, few is not None
        if key not in self.lowered:
            self.lowered[key] = traced.lowered(dtype, rows, few)
        return self.lowered[key]
