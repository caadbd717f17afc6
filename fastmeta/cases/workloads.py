"""The workloads that are timed: the table of docs/architecture.md, "Benchmarks". To add one, add an
entry."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

from torch import nn

from fastmeta.cases.case import Case
from fastmeta.cases.networks import Transformer, mlp
from fastmeta.models import Conv4


def _workload(
    label: str,
    widths: tuple[int, ...],
    tasks: Sequence[int],
    shots: int,
    queries: int,
    steps: Sequence[int],
    loss: str,
    lr: float,
    norm: str = "",
) -> tuple[Case, ...]:
    make = partial(mlp, widths, "relu", norm=norm)
    return tuple(
        Case(
            label, make, (widths[0],), count, shots, queries, inner, loss, lr=lr, kinks=True, wrt_inputs=False
        )
        for count in tasks
        for inner in steps
    )


def _images(
    label: str,
    make: Callable[[], nn.Module],
    shape: tuple[int, ...],
    tasks: Sequence[int],
    sizes: Sequence[tuple[int, ...]],
) -> tuple[Case, ...]:
    """5-way cases; `sizes` are (shots, queries, steps), N and M counting all classes."""
    return tuple(
        Case(label, make, shape, count, shots, queries, steps, "ce", lr=0.01, kinks=True, wrt_inputs=False)
        for count in tasks
        for shots, queries, steps in sizes
    )


_OMNIGLOT = ((5, 25, 1), (5, 25, 5), (5, 75, 1), (5, 75, 5))
_conv4 = partial(Conv4, 5)
_transformer = partial(Transformer, 8, 16, 64, 5, layers=2, heads=4)

WORKLOADS: dict[str, tuple[Case, ...]] = {
    "sinusoid": _workload("sinusoid", (1, 40, 40, 1), (4, 32, 256, 1024), 10, 10, (1, 5), "mse", 0.01),
    "mlp": _workload("mlp", (784, 256, 128, 64, 64, 5), (16, 32), 5, 75, (1, 5), "ce", 0.01),
    "mlp-bn": _workload("mlp-bn", (784, 256, 128, 64, 64, 5), (16, 32), 5, 75, (1, 5), "ce", 0.01, "bn"),
    "recommender": _workload("recommender", (128, 64, 64, 1), (32,), 20, 10, (1, 5), "mse", 0.01),
    "omniglot": _images("conv4", _conv4, (1, 28, 28), (4, 32), _OMNIGLOT),
    "omniglot-strided": _images(
        "conv4-strided", partial(_conv4, form="strided"), (1, 28, 28), (4, 32), _OMNIGLOT
    ),
    "miniimagenet": _images(
        "conv4-84",
        partial(_conv4, in_channels=3, width=32, image_size=84),
        (3, 84, 84),
        (4,),
        ((5, 75, 5), (25, 75, 5)),
    ),
    # no layer program: what the torch backend is for
    "transformer": tuple(
        Case("transformer", _transformer, (16, 8), 4, 5, 15, steps, "ce", lr=0.01, wrt_inputs=False)
        for steps in (1, 5, 20)
    ),
}
