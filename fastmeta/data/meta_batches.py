"""What every data set of tasks shares: the episode, the indexing and the random streams."""

from __future__ import annotations

from collections.abc import Iterator
from operator import index as as_index
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from fastmeta.models.check import MOST


class Episode(NamedTuple):
    """The support and query sets of T tasks: one meta-batch, in the order that MAML takes it.

    Args:
        support_x: [T, N, *in].
        support_y: [T, N, *out] targets, or [T, N] class indices (int64).
        query_x: [T, M, *in].
        query_y: [T, M, *out] targets, or [T, M] class indices (int64).
    """

    support_x: Tensor
    support_y: Tensor
    query_x: Tensor
    query_y: Tensor

    def to(self, device: torch.device | str | int, non_blocking: bool = False) -> Episode:
        """The same episode on another device."""
        return Episode(*(tensor.to(device, non_blocking=non_blocking) for tensor in self))


class MetaBatches(Dataset[Episode]):
    """A map-style data set of `iterations` meta-batches; item i follows from (seed, i) alone.

    Loop over it, index it, or give it to `DataLoader(data, batch_size=None, num_workers=...)`: the
    episodes are the same, in any order and in any process, and each owns its memory.

    Raises:
        TypeError: an integer argument is no integer.
        ValueError: `tasks` or `iterations` is not in 1 .. 2**31 - 1, or `seed` not in
            0 .. 2**64 - 1.
    """

    def __init__(self, tasks: int, iterations: int, seed: int) -> None:
        self.tasks = self._integer("tasks", tasks)
        self.iterations = self._integer("iterations", iterations)
        self.seed = self._integer("seed", seed, 0, 2**64 - 1)

    def __len__(self) -> int:
        return self.iterations

    def __getitem__(self, index: int) -> Episode:
        raise NotImplementedError

    def __iter__(self) -> Iterator[Episode]:
        for index in range(self.iterations):
            yield self[index]

    def _position(self, index: int) -> int:
        """`index` in 0 .. iterations - 1; a negative one counts from the end, as in a list."""
        name = type(self).__name__
        try:
            position = as_index(index)
        except TypeError:
            raise TypeError(
                f"{name}: `index` must be an integer, the number of a meta-batch, got {index!r}"
            ) from None
        if position < 0:
            position += self.iterations
        if not 0 <= position < self.iterations:
            raise IndexError(f"{name}: `index` must be below iterations = {self.iterations}, got {index}")
        return position

    def _generator(self, stream: int) -> np.random.Generator:
        """Random stream number `stream` of this seed."""
        # Philox is counter-based: a stream is a place in the counter, reached without drawing what
        # is before it. Word 0 of the counter is left to the draws, 2**64 blocks of them.
        key = np.array([self.seed, 0], dtype=np.uint64)
        counter = np.array([0, stream, 0, 0], dtype=np.uint64)
        return np.random.Generator(np.random.Philox(key=key, counter=counter))

    def _integer(self, name: str, value: int, low: int = 1, high: int = MOST) -> int:
        """`value` as an int, or an error that names the argument."""
        expected = f"in {low} .. {high}"
        try:
            number = as_index(value)
        except TypeError:
            message = f"{type(self).__name__}: `{name}` must be an integer {expected}, got {value!r}"
            raise TypeError(message) from None
        if not low <= number <= high:
            raise ValueError(f"{type(self).__name__}: `{name}` must be {expected}, got {number}")
        return number
