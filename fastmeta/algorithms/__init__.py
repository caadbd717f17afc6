"""Meta-learning algorithms: one `nn.Module` each, on top of the operators."""

from fastmeta.algorithms.cavia import CAVIA, Context
from fastmeta.algorithms.maml import MAML, MetaLoss
from fastmeta.algorithms.reptile import Reptile, ReptileLoss

__all__ = ["CAVIA", "MAML", "Context", "MetaLoss", "Reptile", "ReptileLoss"]
