"""Update rules of the inner loop: one file a rule, each with its update and the adjoint of its
update."""

from fastmeta.update_rules.sgd import SGD

__all__ = ["SGD"]
