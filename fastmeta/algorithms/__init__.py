"""Meta-learning algorithms: one `nn.Module` each, on top of the operators."""

from fastmeta.algorithms.cavia import CAVIA, Context
from fastmeta.algorithms.imaml import IMAML, IMAMLLoss
from fastmeta.algorithms.maml import MAML, MetaLoss
from fastmeta.algorithms.maml_plus_plus import MAMLPlusPlus
from fastmeta.algorithms.meta_curvature import MetaCurvature
from fastmeta.algorithms.relatives import ANIL, BOIL, FOMAML, MetaSGD
from fastmeta.algorithms.reptile import Reptile, ReptileLoss

__all__ = [
    "ANIL",
    "BOIL",
    "CAVIA",
    "FOMAML",
    "IMAML",
    "MAML",
    "Context",
    "IMAMLLoss",
    "MAMLPlusPlus",
    "MetaCurvature",
    "MetaLoss",
    "MetaSGD",
    "Reptile",
    "ReptileLoss",
]
