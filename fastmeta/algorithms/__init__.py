"""Meta-learning algorithms: one `nn.Module` each, on top of the operators."""

from fastmeta.algorithms.cavia import CAVIA, Context
from fastmeta.algorithms.imaml import IMAML, IMAMLLoss
from fastmeta.algorithms.maml import MAML, MetaLoss
from fastmeta.algorithms.reptile import Reptile, ReptileLoss

__all__ = ["CAVIA", "IMAML", "MAML", "Context", "IMAMLLoss", "MetaLoss", "Reptile", "ReptileLoss"]
