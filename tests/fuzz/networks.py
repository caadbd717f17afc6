"""Small networks of every sort for the fuzzers, by name."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

SMOOTH = {"tanh": nn.Tanh, "gelu": nn.GELU, "silu": nn.SiLU, "sigmoid": nn.Sigmoid, "softplus": nn.Softplus}
KINKED = {"relu": nn.ReLU, "leaky_relu": nn.LeakyReLU, "elu": nn.ELU, "prelu": nn.PReLU}
ACTIVATIONS = SMOOTH | KINKED
NORMS: dict[str, Callable[[int], nn.Module]] = {
    "none": lambda width: nn.Identity(),
    "batch": nn.BatchNorm1d,
    "batch_plain": lambda width: nn.BatchNorm1d(width, affine=False),
    "layer": nn.LayerNorm,
    "group": lambda width: nn.GroupNorm(1, width),
}
CLASSES = 3


class Wrapped(nn.Module):
    """Layers under a forward of its own."""

    def __init__(self, forward: Callable[..., Tensor], **layers: nn.Module | nn.Parameter) -> None:
        super().__init__()
        for name, layer in layers.items():
            setattr(self, name, layer)
        self.run = forward

    def forward(self, x: Tensor) -> Tensor:
        return self.run(self, x)


def mlp(width: int, activation: str, norm: str, bias: bool, depth: int) -> nn.Module:
    layers: list[nn.Module] = []
    inputs = 4
    for _ in range(depth):
        layers += [nn.Linear(inputs, width, bias=bias), NORMS[norm](width), ACTIVATIONS[activation]()]
        inputs = width
    return nn.Sequential(*layers, nn.Linear(inputs, CLASSES))


def conv1d(width: int, activation: str, norm: str, bias: bool, depth: int) -> nn.Module:
    norms = {
        "batch": nn.BatchNorm1d,
        "batch_plain": lambda c: nn.BatchNorm1d(c, affine=False),
        "group": lambda c: nn.GroupNorm(1, c),
    }
    layers: list[nn.Module] = [nn.Unflatten(1, (1, 4))]
    channels = 1
    for _ in range(depth):
        layers += [
            nn.Conv1d(channels, width, 3, padding=1, bias=bias),
            norms.get(norm, nn.Identity)(width),
            ACTIVATIONS[activation](),
        ]
        channels = width
    return nn.Sequential(*layers, nn.AvgPool1d(2), nn.Flatten(), nn.Linear(2 * channels, CLASSES))


def conv2d(width: int, activation: str, norm: str, bias: bool, depth: int) -> nn.Module:
    norms = {
        "batch": nn.BatchNorm2d,
        "batch_plain": lambda c: nn.BatchNorm2d(c, affine=False),
        "group": lambda c: nn.GroupNorm(1, c),
    }
    layers: list[nn.Module] = []
    channels = 2
    for at in range(depth):
        layers += [
            nn.Conv2d(channels, width, 3, padding=1, stride=1 + at % 2, bias=bias),
            norms.get(norm, nn.Identity)(width),
            ACTIVATIONS[activation](),
        ]
        channels = width
    return nn.Sequential(*layers, nn.MaxPool2d(2, ceil_mode=True), nn.Flatten(), nn.LazyLinear(CLASSES))


def residual(width: int, activation: str, norm: str, bias: bool, depth: int) -> nn.Module:
    def forward(self: nn.Module, x: Tensor) -> Tensor:
        x = self.first(x)
        for block in self.blocks:
            x = x + block(x)
        return self.head(x)

    blocks = [
        nn.Sequential(nn.Linear(width, width, bias=bias), NORMS[norm](width), ACTIVATIONS[activation]())
        for _ in range(depth)
    ]
    return Wrapped(
        forward, first=nn.Linear(4, width), blocks=nn.ModuleList(blocks), head=nn.Linear(width, CLASSES)
    )


def shared(width: int, activation: str, norm: str, bias: bool, depth: int) -> nn.Module:
    layer, act = nn.Linear(width, width, bias=bias), ACTIVATIONS[activation]()
    return nn.Sequential(
        nn.Linear(4, width), act, *[layer, act] * depth, NORMS[norm](width), nn.Linear(width, CLASSES)
    )


def tied(width: int, activation: str, norm: str, bias: bool, depth: int) -> nn.Module:
    layers = [nn.Linear(width, width, bias=bias) for _ in range(depth + 1)]
    for layer in layers[1:]:
        layer.weight = layers[0].weight
    return nn.Sequential(
        nn.Linear(4, width), *layers, ACTIVATIONS[activation](), NORMS[norm](width), nn.Linear(width, CLASSES)
    )


def written(width: int, activation: str, norm: str, bias: bool, depth: int) -> nn.Module:
    def forward(self: nn.Module, x: Tensor) -> Tensor:
        h = self.act(F.linear(x, self.first.weight, self.first.bias))
        gate = torch.sigmoid(h @ self.gate)
        h = torch.cat([h * gate, x], -1)
        return self.head(h) * self.scale + self.shift

    return Wrapped(
        forward,
        first=nn.Linear(4, width, bias=bias),
        act=ACTIVATIONS[activation](),
        gate=nn.Parameter(torch.randn(width, width) * 0.3),
        head=nn.Linear(width + 4, CLASSES),
        scale=nn.Parameter(torch.ones(())),
        shift=nn.Parameter(torch.zeros(CLASSES)),
    )


def points(width: int, activation: str, norm: str, bias: bool, depth: int) -> nn.Module:
    """Layers on the last dimension of [P, 2]; the mean over the points behind them."""

    def forward(self: nn.Module, x: Tensor) -> Tensor:
        return self.head(self.body(x).mean(1))

    norm_layer = nn.LayerNorm(width) if norm == "layer" else nn.Identity()
    body = nn.Sequential(nn.Linear(2, width, bias=bias), norm_layer, ACTIVATIONS[activation]())
    return Wrapped(forward, body=body, head=nn.Linear(width, CLASSES))


def positions(width: int, activation: str, norm: str, bias: bool, depth: int) -> nn.Module:
    """An output for every position: [C, L]."""
    return nn.Sequential(
        nn.Unflatten(1, (2, 2)),
        nn.Conv1d(2, width, 1, bias=bias),
        ACTIVATIONS[activation](),
        nn.Conv1d(width, CLASSES, 1),
    )


def recurrent(width: int, activation: str, norm: str, bias: bool, depth: int) -> nn.Module:
    def forward(self: nn.Module, x: Tensor) -> Tensor:
        return self.head(self.core(x)[0][:, -1])

    core = (nn.RNN, nn.GRU, nn.LSTM)[depth % 3]
    return Wrapped(forward, core=core(2, width, batch_first=True, bias=bias), head=nn.Linear(width, CLASSES))


def attention(width: int, activation: str, norm: str, bias: bool, depth: int) -> nn.Module:
    def forward(self: nn.Module, x: Tensor) -> Tensor:
        h = self.embed(x)
        h = h + self.attend(h, h, h, need_weights=False)[0]
        return self.head(self.act(h).mean(1))

    return Wrapped(
        forward,
        embed=nn.Linear(2, 2 * width),
        attend=nn.MultiheadAttention(2 * width, 2, batch_first=True),
        act=ACTIVATIONS[activation](),
        head=nn.Linear(2 * width, CLASSES),
    )


class Bounded(nn.Module):
    """A parametrization. Not weight_norm: the second derivative of PyTorch's own is wrong."""

    def forward(self, weight: Tensor) -> Tensor:
        return torch.tanh(weight) * weight.norm()


def parametrized(width: int, activation: str, norm: str, bias: bool, depth: int) -> nn.Module:
    first = nn.Linear(4, width, bias=bias)
    nn.utils.parametrize.register_parametrization(first, "weight", Bounded())
    return nn.Sequential(first, ACTIVATIONS[activation](), nn.Linear(width, CLASSES))


def embedded(width: int, activation: str, norm: str, bias: bool, depth: int) -> nn.Module:
    """Reads indices below 5."""

    def forward(self: nn.Module, x: Tensor) -> Tensor:
        return self.head(self.act(self.table(x).flatten(1)))

    padding = {"padding_idx": 0} if depth == 2 else {}
    return Wrapped(
        forward,
        table=nn.Embedding(5, width, **padding),
        act=ACTIVATIONS[activation](),
        head=nn.Linear(3 * width, CLASSES),
    )


#: name -> (how to build one, shape of one example; indices where the first entry says so).
NETWORKS: dict[str, tuple[Callable[..., nn.Module], tuple[int, ...]]] = {
    "mlp": (mlp, (4,)),
    "conv1d": (conv1d, (4,)),
    "conv2d": (conv2d, (2, 5, 5)),
    "residual": (residual, (4,)),
    "shared": (shared, (4,)),
    "tied": (tied, (4,)),
    "written": (written, (4,)),
    "points": (points, (3, 2)),
    "positions": (positions, (4,)),
    "recurrent": (recurrent, (3, 2)),
    "attention": (attention, (3, 2)),
    "parametrized": (parametrized, (4,)),
    "embedded": (embedded, (3,)),
}
INTEGER_INPUTS = frozenset({"embedded"})


def build(name: str, width: int, activation: str, norm: str, bias: bool, depth: int, seed: int) -> nn.Module:
    """A network in float64 with running statistics that have seen something."""
    maker, shape = NETWORKS[name]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net = maker(width, activation, norm, bias, depth)
        if any(isinstance(module, nn.modules.lazy.LazyModuleMixin) for module in net.modules()):
            net(torch.zeros(2, *shape))
        for module in net.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.running_mean.normal_(0, 0.3)
                module.running_var.uniform_(0.5, 2)
                module.num_batches_tracked.fill_(1)
        return net.double()
