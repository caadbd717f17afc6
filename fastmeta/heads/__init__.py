"""Heads that are solved, not trained: support features to query logits, for all tasks."""

from fastmeta.heads.logistic import Logistic, logistic
from fastmeta.heads.prototypes import Prototypes, prototypes
from fastmeta.heads.ridge import Ridge, ridge

__all__ = ["Logistic", "Prototypes", "Ridge", "logistic", "prototypes", "ridge"]
