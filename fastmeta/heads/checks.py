"""The checks that all heads share. They read values: a head is called once for a meta-batch."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from fastmeta.models.check import is_finite, positive
from fastmeta.ops.options import argument
from fastmeta.ordinary import check_ordinary

_DTYPES = (torch.float32, torch.float64)


def check_features(
    who: str,
    support_features: Tensor,  # [T, N, D]
    query_features: Tensor,  # [T, M, D]
) -> None:
    """Check the features of both sets.

    Raises:
        TypeError, ValueError: names the argument, what was expected and what came.
    """
    for name, dims, features in (
        ("support_features", "[T, N, D]", support_features),
        ("query_features", "[T, M, D]", query_features),
    ):
        what = argument(who, name)
        if not isinstance(features, Tensor):
            raise TypeError(f"{what} must be a tensor, got {type(features).__name__}")
        check_ordinary(what, features)
        if features.dtype not in _DTYPES:
            raise TypeError(f"{what} must be torch.float32 or torch.float64, got {features.dtype}")
        if features.dim() != 3 or 0 in features.shape:
            raise ValueError(f"{what} must be {dims} and not empty, got {tuple(features.shape)}")
    tasks, _, width = support_features.shape
    if query_features.shape[0] != tasks or query_features.shape[2] != width:
        raise ValueError(
            f"{argument(who, 'query_features')} must be [T, M, D] with T = {tasks} and D = {width}, as "
            f"`support_features`, got {tuple(query_features.shape)}"
        )
    check_like(argument(who, "query_features"), query_features, support_features, "`support_features`")
    check_finite(argument(who, "support_features"), support_features)
    check_finite(argument(who, "query_features"), query_features)


def check_classes(
    who: str,
    support_y: Tensor,
    support_features: Tensor,  # [T, N, D]
    ways: int | None,
) -> Tensor:
    """One-hot rows of the classes, [T, N, C], in the features' dtype.

    Args:
        who: the head, for messages.
        support_y: [T, N], int64, in [0, C).
        support_features: checked already.
        ways: C; None: the largest class of all tasks, plus one.

    Raises:
        TypeError, ValueError: names the argument, what was expected and what came.
    """
    what, lead = argument(who, "support_y"), tuple(support_features.shape[:2])
    if not isinstance(support_y, Tensor):
        raise TypeError(f"{what} must be a tensor, got {type(support_y).__name__}")
    check_ordinary(what, support_y)
    if support_y.dtype != torch.int64:
        raise TypeError(f"{what} must be torch.int64 (class indices), got {support_y.dtype}")
    if tuple(support_y.shape) != lead:
        raise ValueError(f"{what} must be [T, N] = {lead}, got {tuple(support_y.shape)}")
    if support_y.device != support_features.device:
        raise ValueError(
            f"{what} must be on {support_features.device}, as the features, got {support_y.device}"
        )
    above = "" if ways is None else f" below {positive(who, 'ways', ways)}"
    count = int(support_y.max()) + 1 if ways is None else ways
    wrong = (support_y < 0) | (support_y >= count)
    if wrong.any():
        place = wrong.nonzero()[0].tolist()
        got = support_y[tuple(place)].item()
        raise ValueError(f"{what} must hold classes from 0 on{above}, got {got} at {place}")
    try:
        return F.one_hot(support_y, count).to(support_features.dtype)
    except RuntimeError as error:
        raise ValueError(
            f"{what} must hold classes 0 .. C - 1 with [T, N, C] numbers in memory, got class {count - 1}: "
            f"{error}"
        ) from error


def check_weights(
    who: str,
    support_weights: Tensor | None,
    support_features: Tensor,  # [T, N, D]
) -> Tensor:
    """The example weights, [T, N, 1]; ones if there are none.

    Raises:
        TypeError, ValueError: names the argument, what was expected and what came; a weight is
            negative or not finite, or a task has none that is positive.
    """
    what, lead = argument(who, "support_weights"), tuple(support_features.shape[:2])
    if support_weights is None:
        return support_features.new_ones(*lead, 1)
    if not isinstance(support_weights, Tensor):
        raise TypeError(f"{what} must be a tensor, got {type(support_weights).__name__}")
    check_ordinary(what, support_weights)
    if tuple(support_weights.shape) != lead:
        raise ValueError(f"{what} must be [T, N] = {lead}, got {tuple(support_weights.shape)}")
    check_like(what, support_weights, support_features, "the features")
    check_finite(what, support_weights)
    if (support_weights < 0).any():
        place = (support_weights < 0).nonzero()[0].tolist()
        raise ValueError(
            f"{what} must not be negative, got {support_weights[tuple(place)].item()} at {place}"
        )
    without = tasks_where(~(support_weights > 0).any(1))
    if without:
        raise ValueError(
            f"{what} must leave every task an example, tasks {without} have weights of zero only"
        )
    return support_weights[..., None]


def check_factor(
    who: str,
    name: str,
    value: float | Tensor,
    features: Tensor,  # [T, N, D]
    *,
    above_zero: bool = False,
) -> Tensor:
    """A hyperparameter, one for all tasks or one for each, as [1 or T, 1, 1].

    Args:
        who: the head, for messages.
        name: of the argument.
        value: a number, or a tensor () or [T] of the features' dtype.
        features: checked already.
        above_zero: whether zero and less are refused.

    Raises:
        TypeError, ValueError: names the argument, what was expected and what came.
    """
    what, tasks = argument(who, name), features.shape[0]
    if isinstance(value, Tensor):
        check_ordinary(what, value)
        check_like(what, value, features, "the features")
        if tuple(value.shape) not in ((), (tasks,)):
            raise ValueError(f"{what} must be () or [T] = {(tasks,)}, got {tuple(value.shape)}")
    elif isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{what} must be a number or a tensor, got {value!r}")
    elif not is_finite(value):
        raise ValueError(f"{what} must be finite, got {value}")
    else:
        value = torch.tensor(value, dtype=features.dtype, device=features.device)
    check_finite(what, value)
    if above_zero and not (value > 0).all():
        raise ValueError(f"{what} must be positive, got {value.min().item()}")
    return value.reshape(-1, 1, 1)


def check_like(what: str, tensor: Tensor, like: Tensor, other: str) -> None:
    """Check that two tensors have the same dtype and device.

    Raises:
        TypeError, ValueError: names both.
    """
    if tensor.dtype != like.dtype:
        raise TypeError(f"{what} must be {like.dtype}, as {other}, got {tensor.dtype}")
    if tensor.device != like.device:
        raise ValueError(f"{what} must be on {like.device}, as {other}, got {tensor.device}")


def check_finite(what: str, tensor: Tensor) -> None:
    """Check that a tensor holds numbers.

    Raises:
        ValueError: it has NaN or an infinity; names the first one and its place.
    """
    wrong = ~tensor.isfinite()
    if wrong.any():
        place = wrong.nonzero()[0].tolist()
        raise ValueError(f"{what} must be finite, got {tensor[tuple(place)].item()} at {place}")


def check_logits(
    who: str,
    logits: Tensor,  # [T, M, C]
) -> Tensor:
    """`logits`, if they are finite.

    Raises:
        RuntimeError: they are not, although the input was: the arithmetic overflowed; names the
            tasks.
    """
    wrong = tasks_where(~logits.isfinite().flatten(1).all(1))
    if wrong:
        raise RuntimeError(
            f"{who}: the features of tasks {wrong} are too large for {logits.dtype}, the logits overflow"
        )
    return logits


def tasks_where(
    condition: Tensor,  # [T], bool
) -> list[int]:
    """The tasks for which `condition` holds."""
    return condition.nonzero().flatten().tolist()
