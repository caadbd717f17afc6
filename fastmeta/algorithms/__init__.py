"""Meta-learning algorithms: one `nn.Module` each, on top of the operators."""

from fastmeta.algorithms.maml import MAML, MetaLoss
from fastmeta.algorithms.reptile import Reptile, ReptileLoss

__all__ = ["MAML", "MetaLoss", "Reptile", "ReptileLoss"]
