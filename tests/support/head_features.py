"""Features and labels for the tests of closed-form heads."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

T, C = 3, 3
F64 = torch.float64
#: (T, N, M, D): fewer examples than features, as many, more; one of everything
SHAPES = pytest.mark.parametrize(
    "shape", [(T, 7, 5, 13), (T, 6, 5, 6), (T, 13, 4, 5), (1, 1, 1, 1), (1, 1, 1, 4)]
)


def features(tasks: int, support: int, query: int, width: int) -> tuple[Tensor, Tensor, Tensor]:
    """supportfeatures, support_y, queryfeatures."""
    random = torch.Generator().manual_seed(0)
    x, q = (torch.randn(tasks, n, width, generator=random, dtype=F64) for n in (support, query))
    return x, torch.randint(C, (tasks, support), generator=random), q
