"""All meta-parameters in one vector: one leaf for autograd, one tensor for the optimiser."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fastmeta.algorithms.flat_parameters import FlatParameters, views
from fastmeta.algorithms.maml import MAML
from fastmeta.algorithms.rule_tensors import PREFIX
from fastmeta.ops.adapted import mark_as_trained


def flatten(maml: MAML) -> Tensor:
    """Move all parameters of `maml` that require grad, learned rates and what is learned of the
    update rule last, into one vector.

    The vector is the only leaf from here on: backward fills `flat.grad` and no other, the
    parameters are views of
    it that require no grad themselves: an optimiser must get the vector, one on `maml.parameters()`
    moves nothing. They count as if they did where `adapt` asks; what shall be frozen is to be
    frozen before. `state_dict` and `load_state_dict` work as before.

        flat = fm.flatten(maml)
        optimizer = torch.optim.Adam([flat], fused=True)

    A copy (deepcopy, pickle), a conversion (.double(), .to()) or a replaced layer has parameters
    outside the vector: the next call raises RuntimeError until `fm.flatten` is called again, on the
    copy for a copy.

    Args:
        maml: is modified. Flattening it again returns the same vector, or a new one if the old was
            lost.

    Returns:
        [P], a leaf that requires grad.

    Raises:
        TypeError: not a MAML, or parameters of different dtypes or on different devices.
        ValueError: no parameter requires grad.

    Source: docs/algorithms.md, "Flat meta-parameters".
    """
    if not isinstance(maml, MAML):
        raise TypeError(f"flatten: `maml` must be a fastmeta.MAML, got {type(maml).__name__}")
    own = maml._machinery
    params, rates = own.meta_parameters(check=False)
    old = own.flat
    if old is not None and old.holds(params, rates):
        return old.vector
    # a lost vector has left its parameters without requires_grad: its own names say which they were
    names = tuple(
        name for name, value in params.items() if (name in old.names if old else value.requires_grad)
    )
    keys = tuple(key for key, value in rates.items() if (key in old.keys if old else value.requires_grad))
    parts = [params[name] for name in names] + [rates[key] for key in keys]
    for key in keys:
        if not isinstance(rates[key], nn.Parameter):
            raise ValueError(
                "flatten: `update_rule` of `maml` has a tensor that requires grad and is no nn.Parameter, "
                f"{key.removeprefix(PREFIX)}, which cannot be moved into a vector"
            )
    if not parts:
        raise ValueError("flatten: no parameter of `maml` requires grad")
    for part in parts:
        if (part.dtype, part.device) != (parts[0].dtype, parts[0].device):
            raise TypeError(
                f"flatten: all parameters must have one dtype and device, got {parts[0].dtype} on "
                f"{parts[0].device} and {part.dtype} on {part.device}"
            )
    with torch.no_grad():
        vector = torch.cat([part.detach().reshape(-1) for part in parts])
        for part, view in zip(parts, views(vector, parts), strict=True):
            part.data = view
            part.grad = None
            part.requires_grad_(False)
            mark_as_trained(part)
    own.flat = FlatParameters(vector.requires_grad_(), names, keys)
    return own.flat.vector
