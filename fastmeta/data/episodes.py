"""N-way K-shot tasks sampled from labelled examples."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fastmeta.data.examples import Data, gather
from fastmeta.data.meta_batches import Episode, MetaBatches

_Indices = NDArray[np.int64]


class Episodes(MetaBatches):
    """Meta-batches of N-way K-shot classification tasks, a map-style data set.

    Every task draws `ways` classes without replacement and, from each, `shots` support and `query`
    query examples without replacement. The classes are labelled 0 .. ways - 1 in random order;
    within a task the examples are sorted by label. Item i depends only on `seed`, i, the sizes and
    the data.

    Args:
        data: the labelled examples, one of
            - images [classes, examples, ...], or an `Omniglot`;
            - a pair (x [E, ...], y [E] integer labels, any integers);
            - a torch `Dataset` of (x, label) pairs with tensors x, of one shape. Its labels are
              taken from `targets` if it has that, and else read once, here; its examples are read
              when sampled.
        ways: classes of a task.
        shots: support examples of a class; N = ways * shots.
        query: query examples of a class; M = ways * query.
        tasks: T, tasks of a meta-batch.
        iterations: the length of the data set, in meta-batches.
        seed: of all random numbers, 0 .. 2**64 - 1.

    Returns:
        Item i is an `Episode` of support_x [T, N, ...], query_x [T, M, ...], of the data's dtype
        and device, and support_y [T, N], query_y [T, M], int64.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: an argument is out of range, or the data has too few classes or examples of a
            class.

    Source: Vinyals et al. 2016, Matching Networks for One Shot Learning, section 4.1.
    """

    def __init__(
        self,
        data: Data,
        *,
        ways: int,
        shots: int,
        query: int,
        tasks: int,
        iterations: int,
        seed: int = 0,
    ) -> None:
        super().__init__(tasks, iterations, seed)
        self.ways = self._integer("ways", ways)
        self.shots = self._integer("shots", shots)
        self.query = self._integer("query", query)
        self.examples = gather(data)
        counts = self.examples.counts
        if len(counts) < self.ways:
            raise ValueError(
                f"Episodes: `ways` must be at most {len(counts)}, the classes of `data`, got {self.ways}"
            )
        needed = self.shots + self.query
        fewest = int(counts.argmin())
        if counts[fewest] < needed:
            raise ValueError(
                f"Episodes: every class of `data` must have shots + query = {needed} examples, "
                f"class {self.examples.labels[fewest]} has {counts[fewest]}"
            )

    def __getitem__(self, index: int) -> Episode:
        support, query = self.indices(index)
        return Episode(
            self.examples.take(support),
            self._labels(self.shots),
            self.examples.take(query),
            self._labels(self.query),
        )

    def indices(self, index: int) -> tuple[_Indices, _Indices]:
        """Which examples of the data meta-batch `index` holds: support [T, N] and query [T, M].

        Images [classes, examples, ...] are counted class by class: class * examples + example.
        """
        random = self._generator(self._position(index))
        per_class = self.shots + self.query
        counts = self.examples.counts
        classes = _distinct(random, np.full(self.tasks, len(counts)), self.ways).reshape(-1)  # [T * ways]
        places = self.examples.starts[classes, None] + _distinct(random, counts[classes], per_class)
        chosen = self.examples.order[places].reshape(self.tasks, self.ways, per_class)
        support, query = chosen[..., : self.shots], chosen[..., self.shots :]
        return support.reshape(self.tasks, -1), query.reshape(self.tasks, -1)

    def _labels(self, repeats: int) -> Tensor:
        """0 .. ways - 1, each `repeats` times, for every task: [T, ways * repeats]."""
        labels = torch.arange(self.ways, device=self.examples.device)
        return labels.repeat_interleave(repeats).repeat(self.tasks, 1)


def _distinct(random: np.random.Generator, limits: _Indices, number: int) -> _Indices:
    """`number` distinct integers below limits[r] for each row r, in random order: [R, number].

    All ordered choices are equally likely.

    Source: Bentley and Floyd 1987, A sample of brilliance (Floyd's algorithm), here for all rows at
    once.
    """
    tops = limits[:, None] - number + np.arange(number)  # [R, number]
    # A fraction below 1 times an integer below 2**53 rounds down to less than the integer. One draw
    # for all columns is fast.
    picks = (random.random(tops.shape) * (tops + 1)).astype(np.int64)  # in 0 .. tops
    chosen = np.empty_like(picks)
    for column in range(number):
        pick, top = picks[:, column], tops[:, column]
        taken = (chosen[:, :column] == pick[:, None]).any(axis=1)
        chosen[:, column] = np.where(taken, top, pick)
    # Floyd's algorithm makes all sets equally likely, but not all orders.
    return random.permuted(chosen, axis=1)
