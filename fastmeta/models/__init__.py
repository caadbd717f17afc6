"""Networks that the few-shot literature uses, with its usual initialisations; ordinary modules that
are captured."""

from fastmeta.models.conv4 import Conv4
from fastmeta.models.mlp import MLP
from fastmeta.models.resnet12 import ResNet12
from fastmeta.models.siren import Siren

__all__ = ["MLP", "Conv4", "ResNet12", "Siren"]
