"""The multi-layer perceptron."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from torch import Tensor, nn

from fastmeta.models.check import flag, positives


class MLP(nn.Module):
    """Linear layers with ReLU, and batch norm if wanted, between them.

    Args:
        widths: inputs, hidden widths, outputs.
        batch_norm: normalise every hidden layer before its ReLU.
        flatten: inputs are [N, ...] with widths[0] elements an example.

    Shapes: [N, widths[0]] -> [N, widths[-1]].

    Initialisation: He's normal weights and zero biases, so that a network without batch norm keeps
        its signal's size.

    Raises:
        TypeError, ValueError: fewer than two widths, or one that is not a positive int.

    Source: Finn, Abbeel, Levine, "Model-Agnostic Meta-Learning" (2017), section 5.2: (784, 256,
    128, 64, 64, ways) with batch norm for Omniglot; He et al., "Delving Deep into Rectifiers"
    (2015), section 2.2.
    """

    def __init__(self, widths: Sequence[int], *, batch_norm: bool = False, flatten: bool = False) -> None:
        super().__init__()
        widths = positives("MLP", "widths", widths, "inputs and outputs at least", 2)
        batch_norm, flatten = flag("MLP", "batch_norm", batch_norm), flag("MLP", "flatten", flatten)
        layers: list[nn.Module] = [nn.Flatten()] if flatten else []
        for inputs, outputs in pairwise(widths[:-1]):
            layers.append(_linear(inputs, outputs))
            if batch_norm:
                layers.append(nn.BatchNorm1d(outputs))
            layers.append(nn.ReLU())
        self.layers = nn.Sequential(*layers, _linear(widths[-2], widths[-1]))

    def forward(self, x: Tensor) -> Tensor:
        """[N, widths[0]] -> [N, widths[-1]]."""
        return self.layers(x)


def _linear(inputs: int, outputs: int) -> nn.Linear:
    linear = nn.Linear(inputs, outputs)
    nn.init.kaiming_normal_(linear.weight, nonlinearity="relu")
    nn.init.zeros_(linear.bias)
    return linear
