"""Networks of the few-shot literature, with their usual initialisation: ordinary modules."""

from fastmeta.models.conv4 import Conv4
from fastmeta.models.mlp import MLP
from fastmeta.models.resnet12 import ResNet12
from fastmeta.models.siren import Siren

__all__ = ["MLP", "Conv4", "ResNet12", "Siren"]
