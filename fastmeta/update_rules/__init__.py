"""Update rules of the inner loop, a file each: the update and its adjoint."""

from fastmeta.update_rules.sgd import SGD

__all__ = ["SGD"]
