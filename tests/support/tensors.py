"""Tensors of tests: drawn by a seed, and compared bit for bit."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor


def drawn(*shapes: tuple[int, ...], seed: int = 0, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """Normal numbers; the same in every dtype but for rounding."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes]


def equal(one: Iterable[Tensor], other: Iterable[Tensor]) -> bool:
    """Whether two series of tensors are as long and hold the same bits."""
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))
