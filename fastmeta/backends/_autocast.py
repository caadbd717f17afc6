"""The caller's autocast. Kernels know nothing of it; the `torch` backend runs forward passes and
losses under it."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch


def autocast_dtype(device: torch.device) -> torch.dtype | None:
    """What the caller's autocast computes in on a device, None where it is off."""
    kind = device.type
    if not torch.amp.is_autocast_available(kind) or not torch.is_autocast_enabled(kind):
        return None
    return torch.get_autocast_dtype(kind)


def autocast(device: torch.device, dtype: torch.dtype | None) -> AbstractContextManager[object]:
    """Autocast as `autocast_dtype` found it.

    Its cache is off: it would keep the copies of every inner step's parameters until the caller's
    own block ends.
    """
    if dtype == autocast_dtype(device) and (dtype is None or not torch.is_autocast_cache_enabled()):
        return nullcontext()
    if not torch.amp.is_autocast_available(device.type):
        return nullcontext()
    return torch.autocast(device.type, dtype=dtype, enabled=dtype is not None, cache_enabled=False)


def said(chosen: str, device: torch.device) -> str:
    """What `explain()` says of it, "" where it is off."""
    dtype = autocast_dtype(device)
    if dtype is None:
        return ""
    name = str(dtype).removeprefix("torch.")
    if chosen == "torch":
        return (
            f"autocast: forward passes and losses compute in {name} where PyTorch's autocast does; "
            "parameters, inner steps and the outputs that are returned keep their dtype"
        )
    return f"autocast ({name}) is off inside the {chosen} backend; backend='torch' honours it"
