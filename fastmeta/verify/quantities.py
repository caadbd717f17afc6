"""What is compared: every tensor of a result under a name, and the measure of its error."""

from __future__ import annotations

import math
from collections.abc import Iterator

from torch import Tensor

from fastmeta.problem import DIFFERENTIABLE, Result

#: A reference of this norm is nothing but the rounding of terms of order one that cancel, such as
#: the derivative of
#: w l / w by the only weight w of a mean: it counts as zero.
ZERO = 1e-14

#: A tensor of a result: (group, member), as ("d_params", "0.weight"); the member is "" for a group
#: of one.
Key = tuple[str, str]


def quantities(result: Result) -> dict[Key, Tensor]:
    """Every tensor of a result; gradients are called "d_<what>"."""
    return dict(_walk(result))


def _walk(result: Result) -> Iterator[tuple[Key, Tensor]]:
    fields = [(name, getattr(result, name)) for name in ("task_losses", "output", "adapted")]
    fields += [(f"d_{name}", getattr(result.grads, name)) for name in DIFFERENTIABLE]
    for group, value in fields:
        if isinstance(value, dict):
            yield from (((group, member), tensor) for member, tensor in value.items())
        elif isinstance(value, tuple):  # several inputs, None for integers
            yield from (((group, str(i)), leaf) for i, leaf in enumerate(value) if leaf is not None)
        elif value is not None:
            yield (group, ""), value


def groups(keys: dict[Key, Tensor]) -> dict[str, list[Key]]:
    """The keys of each group, in order."""
    found: dict[str, list[Key]] = {}
    for key in keys:
        found.setdefault(key[0], []).append(key)
    return found


def relative_error(out: dict[Key, Tensor], ref: dict[Key, Tensor], keys: list[Key]) -> float:
    """||out - ref|| / ||ref|| in float64 over the tensors called `keys` taken as one vector.

    Returns:
        The error; ||out - ref|| where ref is `ZERO` or less; inf where a tensor is missing, has
        another shape, or where anything is not finite, so that it passes nowhere.
    """
    difference = norm = 0.0
    for key in keys:
        if key not in out or out[key].shape != ref[key].shape:
            return math.inf
        truth = ref[key].double()
        difference += float((out[key].double() - truth).square().sum())
        norm += float(truth.square().sum())
    error = math.sqrt(difference / norm) if norm > ZERO**2 else math.sqrt(difference)
    return error if math.isfinite(error) else math.inf
