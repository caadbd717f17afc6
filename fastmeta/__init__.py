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
from fastmeta.update_rules import SGD, Adagrad, Adam, AdamW, CustomRule, Lion, RMSProp
from fastmeta.version import __version__

__all__ = [
    "ANIL",
    "BOIL",
    "CAVIA",
    "FOMAML",
    "IMAML",
    "MAML",
    "SGD",
    "Adagrad",
    "Adam",
    "AdamW",
    "BackendUnavailable",
    "CaptureError",
    "Context",
    "CustomRule",
    "IMAMLLoss",
    "Inputs",
    "Lion",
    "MAMLPlusPlus",
    "MetaCurvature",
    "MetaGradient",
    "MetaLoss",
    "MetaSGD",
    "RMSProp",
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
