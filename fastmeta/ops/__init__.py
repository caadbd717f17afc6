"""The operators that everything else is made of: contract, checks, autograd and the choice of a
backend."""

from fastmeta.ops.inner_sgd import inner_sgd
from fastmeta.ops.meta_gradient import MetaGradient, meta_gradient
from fastmeta.ops.task_forward import task_forward
from fastmeta.ops.task_gradient import task_gradient

__all__ = ["MetaGradient", "inner_sgd", "meta_gradient", "task_forward", "task_gradient"]
