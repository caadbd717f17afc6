"""Heads that are solved, not trained: from features of a support set to the logits of a query set,
for all tasks."""

from fastmeta.heads.logistic import Logistic, logistic
from fastmeta.heads.prototypes import Prototypes, prototypes
from fastmeta.heads.ridge import Ridge, ridge

__all__ = ["Logistic", "Prototypes", "Ridge", "logistic", "prototypes", "ridge"]
