"""Gradient-based meta-learning in PyTorch: per-task inner loops and exact second-order
meta-gradients, fused."""

from fastmeta import data, heads, models
from fastmeta.algorithms import (
    ANIL,
    BOIL,
    CAVIA,
    FOMAML,
    IMAML,
    MAML,
    Context,
    IMAMLLoss,
    MAMLPlusPlus,
    MetaCurvature,
    MetaLoss,
    MetaSGD,
    Reptile,
    ReptileLoss,
)
from fastmeta.errors import BackendUnavailable, CaptureError
from fastmeta.flat import flatten
from fastmeta.inputs import Inputs
from fastmeta.ops import MetaGradient, inner_sgd, meta_gradient, task_forward, task_gradient
from fastmeta.update_rules import SGD
from fastmeta.version import __version__

__all__ = [
    "ANIL",
    "BOIL",
    "CAVIA",
    "FOMAML",
    "IMAML",
    "MAML",
    "SGD",
    "BackendUnavailable",
    "CaptureError",
    "Context",
    "IMAMLLoss",
    "Inputs",
    "MAMLPlusPlus",
    "MetaCurvature",
    "MetaGradient",
    "MetaLoss",
    "MetaSGD",
    "Reptile",
    "ReptileLoss",
    "__version__",
    "data",
    "flatten",
    "heads",
    "inner_sgd",
    "meta_gradient",
    "models",
    "task_forward",
    "task_gradient",
]
