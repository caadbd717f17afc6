"""How a GPU multiplies float32 numbers: what the user asked PyTorch for, and a way to do without it
for a while."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

_EXACT = threading.local()


def asked_for() -> str:
    """ "highest", "high" or "medium", as `torch.get_float32_matmul_precision()` has it."""
    if getattr(_EXACT, "on", False):
        return "highest"
    try:
        return torch.get_float32_matmul_precision()
    except RuntimeError:  # the user has set it by the newer name, and PyTorch refuses to say it by the older
        newer = torch.backends.cuda.matmul.fp32_precision
        return "high" if newer == "tf32" else "highest"


@contextmanager
def exact() -> Iterator[None]:
    """PyTorch and the GPU backends multiply float32 numbers as they are, whatever the user asked
    for."""
    before = [(place, name, getattr(place, name)) for place, name in _settings()]
    _EXACT.on = True
    try:
        for place, name, value in before:
            setattr(place, name, "ieee" if isinstance(value, str) else False)
        yield
    finally:
        _EXACT.on = False
        for place, name, value in before:
            setattr(place, name, value)


def _settings() -> list[tuple[Any, str]]:
    """Where PyTorch keeps what it may round: by its newer names where it has them, since a mixture
    raises."""
    if not torch.cuda.is_available():
        return []
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    if hasattr(matmul, "fp32_precision") and hasattr(cudnn, "conv"):
        return [(matmul, "fp32_precision"), (cudnn.conv, "fp32_precision")]
    return [(matmul, "allow_tf32"), (cudnn, "allow_tf32")]
