"""Meta-learning algorithms: one `nn.Module` each, on top of the operators."""

from fastmeta.algorithms.maml import MAML, MetaLoss

__all__ = ["MAML", "MetaLoss"]
