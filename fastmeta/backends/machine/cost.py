"""Whether a machine has one task at a time or one in every lane."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from fastmeta.problem import Problem

try:
    from fastmeta import _C
except ImportError:  # the backend says so
    _C = None  # type: ignore[assignment]

if TYPE_CHECKING:
    from fastmeta.backends.machine.plan import Programs

#: Set by tests and benchmarks: True or False instead of the choice below.
import os
LANES: bool | None = {'0':False,'1':True}.get(os.environ.get('FM_LANES',''))


def in_lanes(problem: Problem, programs: Programs, dtype: torch.dtype) -> bool:
    """One task in every lane, where at least half of the lanes have one."""
    if LANES is not None:
        return LANES
    lanes = int(_C.machine_lanes(dtype == torch.float64))
    return problem.tasks >= lanes
