"""Sinusoid regression, the toy problem of the MAML paper."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fastmeta.data.meta_batches import Episode, MetaBatches

AMPLITUDE = (0.1, 5.0)
PHASE = (0.0, np.pi)
INPUT = (-5.0, 5.0)

# Meta-batches drawn together: they share the cost of a random stream and of a dozen array
# operations. The number is part of what a seed means, so it must not depend on the shapes.
BLOCK = 16

_DTYPES = {torch.float32: np.float32, torch.float64: np.float64}


class _Block(NamedTuple):
    """The meta-batches number * BLOCK onwards, in the data set's dtype; B = BLOCK."""

    number: int
    amplitude: NDArray[np.floating]  # [B, T]
    phase: NDArray[np.floating]  # [B, T]
    x: NDArray[np.floating]  # [B, T, N + M, 1]
    y: NDArray[np.floating]  # [B, T, N + M, 1]


class Sinusoid(MetaBatches):
    """Meta-batches of sinusoids y = amplitude * sin(x - phase), a map-style data set.

    Every task draws its amplitude from U[0.1, 5], its phase from U[0, pi] (radians) and its inputs
    from U[-5, 5]. Item i depends only on `seed`, i, `tasks`, `shots` and `query`; it is drawn in
    float64 and then rounded to `dtype`. Test with another seed than in training.

    Args:
        tasks: T, tasks of a meta-batch.
        shots: N, support points of a task.
        query: M, query points of a task; None means `shots`.
        iterations: the length of the data set, in meta-batches.
        seed: of all random numbers, 0 .. 2**64 - 1.
        dtype: of all tensors, torch.float32 or torch.float64.

    Returns:
        Item i is an `Episode` of support_x, support_y [T, N, 1] and query_x, query_y [T, M, 1].

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: an argument is out of range.

    Source: Finn, Abbeel, Levine 2017, Model-Agnostic Meta-Learning, section 5.1.
    """

    def __init__(
        self,
        tasks: int,
        shots: int,
        query: int | None = None,
        *,
        iterations: int,
        seed: int = 0,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__(tasks, iterations, seed)
        self.shots = self._integer("shots", shots)
        self.query = self.shots if query is None else self._integer("query", query)
        if not isinstance(dtype, torch.dtype) or dtype not in _DTYPES:
            raise TypeError(f"Sinusoid: `dtype` must be torch.float32 or torch.float64, got {dtype!r}")
        self.dtype = dtype
        self._cached: _Block | None = None

    def __getitem__(self, index: int) -> Episode:
        block, place = self._block(index)
        x, y, shots = block.x[place], block.y[place], self.shots
        return Episode(_own(x[:, :shots]), _own(y[:, :shots]), _own(x[:, shots:]), _own(y[:, shots:]))

    def parameters(self, index: int) -> tuple[Tensor, Tensor]:
        """Amplitude and phase (radians) of every task of meta-batch `index`, each [T]."""
        block, place = self._block(index)
        return _own(block.amplitude[place]), _own(block.phase[place])

    def _block(self, index: int) -> tuple[_Block, int]:
        """The block that holds meta-batch `index`, and its place in there."""
        number, place = divmod(self._position(index), BLOCK)
        block = self._cached
        if block is None or block.number != number:
            self._cached = block = self._draw(number)
        return block, place

    def _draw(self, number: int) -> _Block:
        random = self._generator(number)
        amplitude = random.uniform(*AMPLITUDE, (BLOCK, self.tasks))
        phase = random.uniform(*PHASE, (BLOCK, self.tasks))
        x = random.uniform(*INPUT, (BLOCK, self.tasks, self.shots + self.query, 1))
        y = amplitude[..., None, None] * np.sin(x - phase[..., None, None])
        return _Block(number, *(array.astype(_DTYPES[self.dtype]) for array in (amplitude, phase, x, y)))


def _own(array: NDArray[np.floating]) -> Tensor:
    """A tensor with a copy of `array`, so that changing an episode leaves the block as it is."""
    return torch.from_numpy(array.copy())
