"""Norms out of elementary operators in code that is the user's own, such as a loss."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from fastmeta.network import elementary
from fastmeta.network.functional import _DECOMPOSED


class Decomposed(TorchFunctionMode):
    """While it is active, derivatives of any order are right: third ones of PyTorch's fused norms silently are not.

    Batch and instance norms normalise as they say themselves; running statistics are left alone.
    """

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        return _REPLACEMENTS.get(func, func)(*args, **(kwargs or {}))


def _batch_norm(
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    mean, var = (None, None) if training else (running_mean, running_var)
    return elementary.batch_norm(x, mean, var, weight, bias, eps)


def _instance_norm(
    x: Tensor,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    use_input_stats: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    mean, var = (None, None) if use_input_stats else (running_mean, running_var)
    return elementary.instance_norm(x, mean, var, weight, bias, eps)


_REPLACEMENTS = {**_DECOMPOSED, F.batch_norm: _batch_norm, F.instance_norm: _instance_norm}
