"""The workloads that are timed: the table of docs/architecture.md, "Benchmarks". To add one, add an
entry."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from torch import nn

from fastmeta.cases.case import Case
from fastmeta.cases.modules import GraphNet, Lora, Melu, Recurrent
from fastmeta.cases.networks import Transformer, mlp
from fastmeta.models import Conv4, Siren


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
_wide_transformer = partial(Transformer, 8, 16, 64, 5, layers=2, heads=4)


def _modules(
    label: str,
    make: Callable[[], nn.Module],
    shape: tuple[int, ...],
    shots: int = 10,
    queries: int = 10,
    loss: str = "mse",
    lr: float = 0.01,
    **options: Any,
) -> tuple[Case, ...]:
    """Cases of a network at 4 and 32 tasks, 1 and 5 steps."""
    return tuple(
        Case(label, make, shape, tasks, shots, queries, steps, loss, lr=lr, wrt_inputs=False, **options)
        for tasks in (4, 32)
        for steps in (1, 5)
    )


#: The last names of the parameters that adapt in `Lora`.
_LOW_RANK = ("*.a", "*.b")

WORKLOADS: dict[str, tuple[Case, ...]] = {
    "sinusoid": _workload("sinusoid", (1, 40, 40, 1), (4, 32, 256, 1024), 10, 10, (1, 5), "mse", 0.01),
    "sinusoid-adam": tuple(
        replace(case, rule="adam_root")
        for case in _workload("sinusoid", (1, 40, 40, 1), (4, 32), 10, 10, (1, 5), "mse", 0.01)
    ),
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
    "siren": _modules("siren", partial(Siren, (2, 128, 128, 128, 3)), (2,), 64, 64, lr=1e-4),
    # no layer program takes the rest
    "lstm": _modules("lstm", partial(Recurrent, nn.LSTM, 8, 32, 1), (10, 8)),
    "gru": _modules("gru", partial(Recurrent, nn.GRU, 8, 32, 1), (10, 8)),
    "transformer": _modules(
        "transformer", partial(Transformer, 8, 8, 32, 5, layers=1, heads=4), (8, 8), 5, 15, "ce"
    ),
    "gnn": _modules("gnn", partial(GraphNet, 4, 32, 1), (10, 4), kinks=True, more_inputs=((10, 10),)),
    "lora": _modules("lora", partial(Lora, 32, 32, 32), (32,), adapt=_LOW_RANK),
    "melu": _modules("melu", partial(Melu, 4, 100, 16, 64), (4,), 20, 10, kinks=True, ids=100),
    "transformer-wide": tuple(
        Case("transformer-wide", _wide_transformer, (16, 8), 4, 5, 15, steps, "ce", lr=0.01, wrt_inputs=False)
        for steps in (1, 5, 20)
    ),
}

#: Workloads that no layer program takes; torch.compile works on them for minutes.
NOT_CAPTURED = frozenset({"lstm", "gru", "transformer", "gnn", "lora", "melu", "transformer-wide"})
