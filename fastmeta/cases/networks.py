"""The networks of the case list: small ones that reach every layer kind, and those of the
workloads."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise
from math import prod

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastmeta.cases.case import Case
from fastmeta.layers.functions import FUNCTIONS

#: Every element-wise layer that is a module, by name.
ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    name: row.module for name, row in FUNCTIONS.items() if row.make is not None or row.modules
}


class Residual(nn.Module):
    """Linear, then x + f(x) twice, once through a functional activation, then a linear head."""

    def __init__(self, inputs: int, width: int, outputs: int, activation: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.stem = nn.Linear(inputs, width)
        self.first = nn.Linear(width, width)
        self.second = nn.Linear(width, width)
        self.head = nn.Linear(width, outputs)
        self.activation = activation()

    def forward(self, x: Tensor) -> Tensor:
        x = self.activation(self.stem(x))
        x = x + self.activation(self.first(x))
        x = torch.tanh(self.second(x)) + x
        return self.head(x)


class Tied(nn.Module):
    """The same weights in two places: one module called twice, and one parameter held by two
    modules."""

    def __init__(self, inputs: int, width: int, outputs: int) -> None:
        super().__init__()
        self.stem = nn.Linear(inputs, width)
        self.shared = nn.Linear(width, width)
        self.other = nn.Linear(width, width)
        self.other.weight = self.shared.weight
        self.head = nn.Linear(width, outputs)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.stem(x))
        x = torch.tanh(self.shared(x))
        x = torch.tanh(self.shared(x))
        return self.head(torch.tanh(self.other(x)))


def half_frozen_norms() -> nn.Module:
    """Batch norms of two feature maps and of two vectors, the first of each in eval mode with
    statistics of its own."""
    norms = [nn.BatchNorm2d(4), nn.BatchNorm2d(6), nn.BatchNorm1d(9), nn.BatchNorm1d(9)]
    _freeze(norms[::2])
    images = [nn.Conv2d(2, 4, 3), norms[0], nn.Tanh(), nn.Conv2d(4, 6, 2), norms[1], nn.Tanh(), nn.Flatten()]
    return nn.Sequential(
        *images, nn.Linear(12, 9), norms[2], nn.Tanh(), nn.Linear(9, 9), norms[3], nn.Linear(9, 3)
    )


def frozen(norm: Callable[[], nn.modules.batchnorm._BatchNorm]) -> nn.Module:
    """A batch norm in eval mode, with running statistics of its own."""
    made = norm()
    _freeze([made])
    return made


def _freeze(norms: Sequence[nn.modules.batchnorm._BatchNorm]) -> None:
    """Eval mode, and running statistics that are no mean of zero and variance of one."""
    for norm in norms:
        norm.eval()
        step = torch.arange(float(norm.num_features))
        norm.running_mean, norm.running_var = 0.1 * step, 1 + 0.2 * step
        norm.num_batches_tracked = torch.tensor(1)


def half_frozen_norms_mlp() -> nn.Module:
    """Batch norms of vectors, every other one in eval mode with statistics of its own."""
    norms = [nn.BatchNorm1d(13), nn.BatchNorm1d(13), nn.BatchNorm1d(7, affine=False)]
    _freeze(norms[::2])
    first, second, third = norms
    body = [nn.Linear(3, 13), first, nn.Tanh(), nn.Linear(13, 13), second, nn.Tanh(), nn.Linear(13, 7), third]
    return nn.Sequential(*body, nn.Tanh(), nn.Linear(7, 5))


class Transformer(nn.Module):
    """Tokens [N, L, I] embedded, with learned positions, through encoder layers, averaged, to a
    linear head."""

    def __init__(
        self,
        inputs: int,
        tokens: int,
        width: int,
        outputs: int,
        layers: int = 2,
        heads: int = 2,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.embed = nn.Linear(inputs, width)
        self.position = nn.Parameter(0.1 * torch.randn(tokens, width))
        layer = nn.TransformerEncoderLayer(
            width, heads, 2 * width, dropout, nn.functional.gelu, batch_first=True
        )
        self.encoder = nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)
        self.head = nn.Linear(width, outputs)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.encoder(self.embed(x) + self.position).mean(1))


#: Norms of an MLP by name, each for so many features.
NORMS: dict[str, Callable[[int], nn.Module]] = {
    "bn": nn.BatchNorm1d,
    "bn_plain": partial(nn.BatchNorm1d, affine=False),
    "ln": nn.LayerNorm,
    "gn": partial(nn.GroupNorm, 2),
}


def mlp(
    widths: Sequence[int], activation: str = "relu", bias: bool = True, flatten: bool = False, norm: str = ""
) -> nn.Sequential:
    """Linear layers of these widths (inputs first, outputs last) with a norm, if wanted, and an
    activation between."""
    layers: list[nn.Module] = [nn.Flatten()] if flatten else []
    for inputs, outputs in pairwise(widths[:-1]):
        layers.append(nn.Linear(inputs, outputs, bias=bias))
        if norm:
            layers.append(NORMS[norm](outputs))
        layers.append(ACTIVATIONS[activation]())
    return nn.Sequential(*layers, nn.Linear(widths[-2], widths[-1], bias=bias))


def mlp_case(widths: Sequence[int], activation: str = "tanh", **options: object) -> Case:
    """A case of an MLP, labelled by its widths and activation."""
    label = f"{activation}-{'x'.join(map(str, widths))}"
    # two correct float32 runs may fall on two sides of a kink
    kinks = bool(FUNCTIONS[activation].kinks)
    return Case(label, partial(mlp, tuple(widths), activation), (widths[0],), kinks=kinks, **options)  # type: ignore[arg-type]


def normed_rows() -> nn.Sequential:
    """Every norm on an input [N, 6, 4], whose channels are its first dimension or its last."""
    return nn.Sequential(
        nn.BatchNorm1d(6),
        nn.Linear(4, 9),
        nn.GroupNorm(2, 6),
        nn.Tanh(),
        nn.LayerNorm((6, 9)),
        nn.Linear(9, 2),
    )


def grid(output: tuple[int, ...]) -> nn.Sequential:
    """[N, 3] -> [N, *output], by linear layers and an unflattening."""
    return nn.Sequential(nn.Linear(3, 13), nn.Tanh(), nn.Linear(13, prod(output)), nn.Unflatten(1, output))


def sequence() -> nn.Sequential:
    """[N, 6, 4] -> [N, 6, 5], along the last dimension."""
    return nn.Sequential(nn.Linear(4, 7), nn.GroupNorm(2, 6), nn.Tanh(), nn.Linear(7, 5))


def segments() -> nn.Sequential:
    """[N, 2, H, W] -> [N, 5, H, W], five numbers a pixel."""
    return nn.Sequential(
        nn.Conv2d(2, 6, 3, padding=1), nn.GroupNorm(2, 6), nn.Tanh(), nn.Conv2d(6, 5, 3, padding=1)
    )


class HalfNorms(nn.Module):
    """Norms with a bias alone, with a weight alone, with one parameter for both, and with neither;
    on the input too."""

    def __init__(self) -> None:
        super().__init__()
        self.bias, self.weight, self.both = (nn.Parameter(torch.rand(n) + 0.5) for n in (13, 26, 26))
        self.body, self.tail, self.head = nn.Linear(13, 26), nn.Linear(26, 26), nn.Linear(26, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.sigmoid(F.batch_norm(x, None, None, None, self.bias, training=True)) + F.layer_norm(
            x, (13,)
        )
        y = torch.tanh(F.layer_norm(self.body(y), (26,), self.weight))
        y = torch.tanh(F.layer_norm(self.tail(y), (26,), self.both, self.both))
        return self.head(F.group_norm(y, 2, None, self.weight))
