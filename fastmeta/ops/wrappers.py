"""Modules around modules that cannot be called with other parameters than their own."""

from __future__ import annotations

import torch
from torch import nn

_SCRIPT = (
    "a TorchScript module, whose parameters cannot be exchanged: pass the Python module it was made from"
)
_PARALLEL = (
    "replicas of its own: pass what it wraps, "
    "and wrap the algorithm, DistributedDataParallel(fastmeta.MAML(net))"
)


def check_wrappers(what: str, net: nn.Module) -> None:
    """Refuse networks that are, or hold, TorchScript or data-parallel modules.

    Raises:
        TypeError: says which module, and what to pass instead.
    """
    for place, module in net.named_modules():
        if isinstance(module, torch.jit.ScriptModule) and (not place or _has_tensors(module)):
            reason = _SCRIPT
        elif isinstance(module, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
            reason = f"a {type(module).__name__}, which makes {_PARALLEL}"
        else:
            continue
        where = f"its `{place}` is {reason}" if place else f"it is {reason}"
        raise TypeError(f"{what} must be called with each task's own parameters, but {where}")


def _has_tensors(module: nn.Module) -> bool:
    return any(True for tensors in (module.parameters(), module.buffers()) for _ in tensors)
