"""Labelled examples in one form, whatever the user has them in."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset, IterableDataset

from fastmeta.data.omniglot import Omniglot
from fastmeta.ordinary import check_ordinary

Data: TypeAlias = "Tensor | Omniglot | tuple[Tensor, Tensor] | Dataset[Any]"


@dataclass(frozen=True, slots=True)
class Examples:
    """E examples of C classes; class c has order[starts[c] : starts[c] + counts[c]]."""

    x: Tensor | Dataset[Any]  # [E, ...], or (x, label) pairs
    labels: NDArray[np.int64]  # [C] as the user has them, ascending
    order: NDArray[np.int64]  # [E]
    starts: NDArray[np.int64]  # [C]
    counts: NDArray[np.int64]  # [C]

    @property
    def device(self) -> torch.device:
        """Where `take` puts the examples."""
        return self.x.device if isinstance(self.x, Tensor) else torch.device("cpu")

    def take(self, indices: NDArray[np.int64]) -> Tensor:
        """The examples of these numbers: indices [...] -> [..., *example]."""
        if isinstance(self.x, Tensor):
            flat = torch.from_numpy(indices.reshape(-1)).to(self.device)
            return self.x.index_select(0, flat).reshape(*indices.shape, *self.x.shape[1:])
        rows = [_pair(self.x, int(number))[0] for number in indices.reshape(-1)]
        for number, row in zip(indices.reshape(-1), rows, strict=True):
            if not isinstance(row, Tensor):
                raise TypeError(
                    f"Episodes: example {number} of `data` must be a tensor, got {type(row).__name__}"
                )
            if row.shape != rows[0].shape or row.dtype != rows[0].dtype:
                raise ValueError(
                    f"Episodes: the examples of `data` must have one shape and dtype, number "
                    f"{indices.reshape(-1)[0]} is {tuple(rows[0].shape)} {rows[0].dtype}, number {number} is "
                    f"{tuple(row.shape)} {row.dtype}"
                )
        return torch.stack(rows).reshape(*indices.shape, *rows[0].shape)


def gather(data: Data) -> Examples:
    """`data`, as `Episodes` takes it, in the common form.

    Raises:
        TypeError: it is of no known kind, or its labels are not integers.
        ValueError: its shapes do not fit together, or it is empty.
    """
    if isinstance(data, Omniglot):
        data = data.images
    parts = data if isinstance(data, tuple) else (data,)
    for part in parts:
        if isinstance(part, Tensor):
            check_ordinary("Episodes: `data`", part)
    if isinstance(data, Tensor):
        if data.ndim < 2:
            raise ValueError(f"Episodes: `data` must be [classes, examples, ...], got {tuple(data.shape)}")
        classes, examples = data.shape[:2]
        return _by_class(data.flatten(0, 1), np.arange(classes).repeat(examples))
    if isinstance(data, tuple) and len(data) == 2 and all(isinstance(part, Tensor) for part in data):
        return _by_class(data[0], _integers(data[1]))
    if isinstance(data, Dataset) and not isinstance(data, IterableDataset) and hasattr(data, "__len__"):
        targets = getattr(data, "targets", None)
        if targets is None:
            targets = [_pair(data, number)[1] for number in range(len(data))]
        return _by_class(data, _integers(targets))
    raise TypeError(
        "Episodes: `data` must be a tensor [classes, examples, ...], an Omniglot, a pair of tensors (x, y) "
        f"or a map-style torch Dataset of (x, label) pairs, got {type(data).__name__}"
    )


def _by_class(x: Tensor | Dataset[Any], labels: NDArray[np.int64]) -> Examples:
    number = len(x)  # type: ignore[arg-type]  # a Dataset with __len__, checked above
    if labels.shape != (number,):
        raise ValueError(
            f"Episodes: `data` must have one label for each of its {number} examples, got {labels.shape}"
        )
    if not number:
        raise ValueError("Episodes: `data` must have examples, got none")
    values, counts = np.unique(labels, return_counts=True)
    return Examples(x, values, labels.argsort(kind="stable"), counts.cumsum() - counts, counts)


def _integers(labels: Any) -> NDArray[np.int64]:
    if isinstance(labels, Tensor):
        labels = labels.detach().cpu().numpy()
    array = np.asarray(labels)
    if array.size and array.dtype.kind not in "iu":
        raise TypeError(f"Episodes: the labels of `data` must be integers, got {array.dtype}")
    return array.astype(np.int64)


def _pair(data: Dataset[Any], number: int) -> tuple[Any, Any]:
    item = data[number]
    if not isinstance(item, (tuple, list)) or len(item) != 2:
        raise TypeError(
            f"Episodes: item {number} of `data` must be a pair (x, label), got {type(item).__name__}"
        )
    return item[0], item[1]
