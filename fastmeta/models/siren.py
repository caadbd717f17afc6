"""The sinusoidal representation network."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn

from fastmeta.models.check import positive_number, positives


class SineLayer(nn.Module):
    """sin(omega_0 (W x + b)).

    Shapes: [N, inputs] -> [N, outputs].
    """

    def __init__(self, inputs: int, outputs: int, omega_0: float) -> None:
        super().__init__()
        self.linear = nn.Linear(inputs, outputs)
        self.omega_0 = omega_0

    def forward(self, x: Tensor) -> Tensor:
        """[N, inputs] -> [N, outputs]."""
        return torch.sin(self.omega_0 * self.linear(x))


class Siren(nn.Module):
    """Sine layers and a linear head: a signal as a function of its coordinates.

    Args:
        widths: coordinates, hidden widths, channels; (2, 256, 256, 256, 3) is an image.
        omega_0: frequency of the sines.

    Shapes: [N, widths[0]] -> [N, widths[-1]]; coordinates in [-1, 1].

    Initialisation: weights uniform in +-1 / inputs in the first layer and +-sqrt(6 / inputs) /
        omega_0 in the others.

    Raises:
        TypeError, ValueError: fewer than three widths, one that is not a positive int, or a
            frequency that is not finite and positive.

    Source: Sitzmann et al., "Implicit Neural Representations with Periodic Activation Functions"
        (2020), section 3.2.
    """

    def __init__(self, widths: Sequence[int], *, omega_0: float = 30.0) -> None:
        super().__init__()
        widths = positives("Siren", "widths", widths, "inputs, hidden widths and outputs", 3)
        omega_0 = positive_number("Siren", "omega_0", omega_0)
        hidden = [SineLayer(a, b, omega_0) for a, b in pairwise(widths[:-1])]
        self.layers = nn.Sequential(*hidden, nn.Linear(widths[-2], widths[-1]))
        for at, module in enumerate(module for module in self.modules() if isinstance(module, nn.Linear)):
            inputs = module.in_features
            bound = 1 / inputs if at == 0 else (6 / inputs) ** 0.5 / omega_0
            nn.init.uniform_(module.weight, -bound, bound)

    def forward(self, x: Tensor) -> Tensor:
        """[N, widths[0]] -> [N, widths[-1]]."""
        return self.layers(x)
