"""What was traced for one sort of problem."""

from __future__ import annotations

from dataclasses import dataclass

import torch

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
    lowered: dict[tuple[str, bool], StepProgram]

    def program(self, role: str, dtype: torch.dtype, rows: bool) -> StepProgram | None:
        """The step program of a set, lowered once."""
        traced = self.support if role == "support" else self.query
        if traced is None:
            return None
        if (role, rows) not in self.lowered:
            self.lowered[role, rows] = traced.lowered(dtype, rows)
        return self.lowered[role, rows]
