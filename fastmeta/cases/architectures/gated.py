"""Networks whose parts scale or choose each other, and weights that other networks make."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastmeta.cases.architectures.small import small

INPUTS, WIDTH = 3, 6


class Glu(nn.Module):
    """A gated linear unit (Dauphin et al., 2017)."""

    def __init__(self) -> None:
        super().__init__()
        self.into, self.out = nn.Linear(INPUTS, 2 * WIDTH), nn.Linear(WIDTH, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(F.glu(self.into(x), -1))


class SwiGlu(nn.Module):
    """SiLU of one product times another (Shazeer, 2020)."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.up = nn.Linear(INPUTS, WIDTH), nn.Linear(INPUTS, WIDTH)
        self.down = nn.Linear(WIDTH, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.silu(self.gate(x)) * self.up(x))


class Highway(nn.Module):
    """Gates that carry the input past two layers (Srivastava et al., 2015)."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(INPUTS, WIDTH)
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(2))
        self.gates = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(2))
        self.head = nn.Linear(WIDTH, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for layer, gate in zip(self.layers, self.gates, strict=True):
            t = torch.sigmoid(gate(x) - 1)
            x = t * torch.tanh(layer(x)) + (1 - t) * x
        return self.head(x)


class Experts(nn.Module):
    """A mixture of experts with soft gates (Jacobs et al., 1991)."""

    def __init__(self, experts: int = 3) -> None:
        super().__init__()
        self.gate = nn.Linear(INPUTS, experts)
        self.experts = nn.ModuleList(
            nn.Sequential(nn.Linear(INPUTS, WIDTH), nn.Tanh(), nn.Linear(WIDTH, 2)) for _ in range(experts)
        )

    def forward(self, x: Tensor) -> Tensor:
        weights = F.softmax(self.gate(x), dim=-1)
        outputs = torch.stack([expert(x) for expert in self.experts], dim=1)
        return (weights.unsqueeze(-1) * outputs).sum(1)


class StackedExperts(nn.Module):
    """The weights of all experts in one tensor, by einsum."""

    def __init__(self, experts: int = 3) -> None:
        super().__init__()
        self.gate = nn.Parameter(torch.randn(INPUTS, experts))
        self.first = nn.Parameter(torch.randn(experts, INPUTS, WIDTH))
        self.second = nn.Parameter(torch.randn(experts, WIDTH, 2))

    def forward(self, x: Tensor) -> Tensor:
        h = F.gelu(torch.einsum("ni,eih->neh", x, self.first))
        return torch.einsum("ne,neh,eho->no", (x @ self.gate).softmax(-1), h, self.second)


class SqueezeExcite(nn.Module):
    """Channels scaled by what all of the image says (Hu et al., 2018)."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, WIDTH, 3, padding=1)
        self.squeeze, self.excite = nn.Conv2d(WIDTH, 2, 1), nn.Conv2d(2, WIDTH, 1)
        self.head = nn.Linear(WIDTH, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.silu(self.conv(x))
        scale = self.excite(F.relu(self.squeeze(F.adaptive_avg_pool2d(x, 1))))
        return self.head((x * torch.sigmoid(scale)).mean((2, 3)))


class Film(nn.Module):
    """The first half of the input scales and shifts what becomes of the second (Perez et al.,
    2018)."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(INPUTS, WIDTH)
        self.condition = nn.Linear(INPUTS, 2 * WIDTH)
        self.head = nn.Linear(WIDTH, 2)

    def forward(self, x: Tensor) -> Tensor:
        condition, x = x.chunk(2, -1)
        gamma, beta = self.condition(condition).split(WIDTH, -1)
        return self.head(torch.relu((1 + gamma) * self.body(x) + beta))


class Hypernetwork(nn.Module):
    """A network that makes the weights of another, for every example (Ha et al., 2017)."""

    def __init__(self) -> None:
        super().__init__()
        self.maker = nn.Sequential(nn.Linear(INPUTS, WIDTH), nn.Tanh(), nn.Linear(WIDTH, INPUTS * 4 + 4))
        self.head = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        made = self.maker(x)
        weight, bias = made[:, : INPUTS * 4].reshape(-1, 4, INPUTS), made[:, INPUTS * 4 :]
        h = torch.bmm(weight, x.unsqueeze(-1)).squeeze(-1) + bias
        return self.head(torch.sin(h))


class Maxout(nn.Module):
    """The largest of three linear pieces (Goodfellow et al., 2013)."""

    def __init__(self) -> None:
        super().__init__()
        self.pieces, self.head = nn.Linear(INPUTS, 3 * WIDTH), nn.Linear(WIDTH, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.pieces(x).view(-1, WIDTH, 3).max(-1).values)


class GatedMlp(nn.Module):
    """Half of the channels gates the other half across positions (Liu et al., "gMLP", 2021)."""

    def __init__(self, tokens: int = 4) -> None:
        super().__init__()
        self.norm, self.into = nn.LayerNorm(INPUTS), nn.Linear(INPUTS, 2 * WIDTH)
        self.gate_norm = nn.LayerNorm(WIDTH)
        self.spatial = nn.Conv1d(tokens, tokens, 1)
        self.out = nn.Linear(WIDTH, INPUTS)

    def forward(self, x: Tensor) -> Tensor:
        u, v = F.gelu(self.into(self.norm(x))).chunk(2, -1)
        return x + self.out(u * (self.spatial(self.gate_norm(v)) + 1))


class Mixer(nn.Module):
    """An MLP across positions, then one across channels (Tolstikhin et al., 2021)."""

    def __init__(self, tokens: int = 4) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(INPUTS) for _ in range(2))
        self.tokens = nn.Sequential(nn.Linear(tokens, WIDTH), nn.GELU(), nn.Linear(WIDTH, tokens))
        self.channels = nn.Sequential(nn.Linear(INPUTS, WIDTH), nn.GELU(), nn.Linear(WIDTH, INPUTS))
        self.head = nn.Linear(INPUTS, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.tokens(self.norms[0](x).transpose(1, 2)).transpose(1, 2)
        x = x + self.channels(self.norms[1](x))
        return self.head(x.mean(1))


CASES = (
    small("glu", Glu, (INPUTS,)),
    small("swiglu", SwiGlu, (INPUTS,)),
    small("highway", Highway, (INPUTS,)),
    small("experts", Experts, (INPUTS,)),
    small("stacked_experts", StackedExperts, (INPUTS,), lr=0.02),
    small("squeeze_excite", SqueezeExcite, (1, 4, 4), loss="ce", kinks=True),
    small("film", Film, (2 * INPUTS,), kinks=True),
    small("hypernetwork", Hypernetwork, (INPUTS,)),
    small("maxout", Maxout, (INPUTS,), kinks=True),
    small("gated_mlp", GatedMlp, (4, INPUTS)),
    small("mixer", Mixer, (4, INPUTS), loss="bce"),
)
