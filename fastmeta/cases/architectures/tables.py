"""Networks of rows: recommenders, splines, features and weights that are shared or tied."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.parametrizations import weight_norm

from fastmeta.cases.architectures.small import small

INPUTS, WIDTH, FIELDS, ENTRIES = 4, 5, 3, 6


class FactorisationMachine(nn.Module):
    """Every pair of fields by the product of their vectors (Rendle, 2010)."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.factors = nn.Embedding(ENTRIES, 1), nn.Embedding(ENTRIES, WIDTH)
        self.bias = nn.Parameter(torch.zeros(1))

    def forward(self, ids: Tensor) -> Tensor:
        factors = self.factors(ids)  # [N, F, W]
        pairs = 0.5 * (factors.sum(1).pow(2) - factors.pow(2).sum(1)).sum(-1, keepdim=True)
        return self.linear(ids).sum(1) + pairs + self.bias


class DeepFm(FactorisationMachine):
    """The same, and an MLP of the same vectors (Guo et al., 2017)."""

    def __init__(self) -> None:
        super().__init__()
        self.deep = nn.Sequential(nn.Linear(FIELDS * WIDTH, 4), nn.ReLU(), nn.Linear(4, 1))

    def forward(self, ids: Tensor) -> Tensor:
        return super().forward(ids) + self.deep(self.factors(ids).flatten(1))


class CrossNetwork(nn.Module):
    """x0 (w x) + b + x, twice, beside an MLP (Wang et al., "DCN", 2017)."""

    def __init__(self) -> None:
        super().__init__()
        self.weights = nn.ParameterList(torch.randn(INPUTS) / 2 for _ in range(2))
        self.biases = nn.ParameterList(torch.randn(INPUTS) / 2 for _ in range(2))
        self.deep = nn.Sequential(nn.Linear(INPUTS, WIDTH), nn.Tanh())
        self.head = nn.Linear(INPUTS + WIDTH, 1)

    def forward(self, x: Tensor) -> Tensor:
        crossed = x
        for weight, bias in zip(self.weights, self.biases, strict=True):
            crossed = x * (crossed @ weight)[:, None] + bias + crossed
        return self.head(torch.cat([crossed, self.deep(x)], -1))


class Bags(nn.Module):
    """The mean of a bag of words, without a look at their order (Joulin et al., 2017)."""

    def __init__(self) -> None:
        super().__init__()
        self.bag, self.head = nn.EmbeddingBag(ENTRIES, WIDTH, mode="mean"), nn.Linear(WIDTH, 3)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(torch.tanh(self.bag(ids)))


class TwoTowers(nn.Module):
    """A user and an item, each by a network of its own, and their cosine (Huang et al., 2013)."""

    def __init__(self) -> None:
        super().__init__()
        self.users, self.items = nn.Embedding(ENTRIES, WIDTH), nn.Embedding(ENTRIES, WIDTH)
        self.user, self.item = nn.Linear(WIDTH, 3), nn.Linear(WIDTH, 3)
        self.temperature = nn.Parameter(torch.tensor(0.5))

    def forward(self, ids: Tensor) -> Tensor:
        user = F.normalize(self.user(self.users(ids[:, 0])), dim=-1)
        item = F.normalize(self.item(self.items(ids[:, 1])), dim=-1)
        return (user * item).sum(-1, keepdim=True) * torch.exp(self.temperature)


class Bilinear(nn.Module):
    """The two halves of the input through `nn.Bilinear`."""

    def __init__(self) -> None:
        super().__init__()
        self.both, self.head = nn.Bilinear(2, 2, WIDTH), nn.Linear(WIDTH, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.both(x[:, :2], x[:, 2:])))


class Kan(nn.Module):
    """A sum of learned functions of each input, by bumps on a grid beside a SiLU (Liu et al.,
    2024)."""

    grid: Tensor

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.register_buffer("grid", torch.linspace(-2, 2, 5))
        self.base = nn.Linear(inputs, outputs)
        self.spline = nn.Parameter(torch.randn(outputs, inputs, 5) / 4)

    def forward(self, x: Tensor) -> Tensor:
        distance = (x[..., None] - self.grid).abs()
        bumps = torch.where(
            distance < 1, 2 / 3 - distance**2 + distance**3 / 2, (2 - distance).clamp(min=0) ** 3 / 6
        )
        return self.base(F.silu(x)) + torch.einsum("nig,oig->no", bumps, self.spline)


class FourierFeatures(nn.Module):
    """Cosines and sines of a constant random matrix (Tancik et al., 2020)."""

    frequencies: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("frequencies", torch.randn(INPUTS, WIDTH))
        self.body = nn.Sequential(nn.Linear(2 * WIDTH, WIDTH), nn.Mish(), nn.Linear(WIDTH, 2))

    def forward(self, x: Tensor) -> Tensor:
        angles = 2 * torch.pi * x @ self.frequencies
        return self.body(torch.cat([angles.cos(), angles.sin()], -1))


class RadialBasis(nn.Module):
    """Gaussians around learned centres, each with a width of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.centres, self.log_widths = (
            nn.Parameter(torch.randn(WIDTH, INPUTS)),
            nn.Parameter(torch.zeros(WIDTH)),
        )
        self.head = nn.Linear(WIDTH, 2)

    def forward(self, x: Tensor) -> Tensor:
        squared = (x[:, None] - self.centres).square().sum(-1)
        return self.head(torch.exp(-squared * torch.exp(self.log_widths) / 4))


class TiedAutoencoder(nn.Module):
    """The decoder's weight is the encoder's, transposed."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Linear(INPUTS, WIDTH)
        self.bias = nn.Parameter(torch.randn(INPUTS))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(torch.sigmoid(self.encoder(x)), self.encoder.weight.t(), self.bias)


class SharedTwice(nn.Module):
    """One block in two places, and a third place that shares its weight alone."""

    def __init__(self) -> None:
        super().__init__()
        first = nn.Linear(INPUTS, INPUTS)
        self.block = nn.Sequential(first, nn.Tanh())
        self.other = nn.Linear(INPUTS, INPUTS)
        self.other.weight = first.weight
        self.head = nn.Linear(INPUTS, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.other(self.block(self.block(x) + x)))


class Permuted(nn.Module):
    """Coupling layers with constant permutations between (Dinh et al., "RealNVP", 2017)."""

    order: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("order", torch.tensor([2, 0, 3, 1]))
        self.nets = nn.ModuleList(
            nn.Sequential(nn.Linear(2, WIDTH), nn.Tanh(), nn.Linear(WIDTH, 4)) for _ in range(2)
        )

    def forward(self, x: Tensor) -> Tensor:
        for net in self.nets:
            kept, changed = x.chunk(2, 1)
            log_scale, shift = net(kept).chunk(2, 1)
            x = torch.cat([kept, changed * torch.exp(torch.tanh(log_scale)) + shift], 1)[:, self.order]
        return x


class Indexed(nn.Module):
    """Advanced indexing by constants: lists, masks, index tensors, strides, an ellipsis."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(4, WIDTH))
        self.head = nn.Linear(12, 2)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(x @ self.table)
        mask = torch.tensor([True, False, True, True, False])
        corner = self.table[torch.tensor([0, 2, 3]), torch.tensor([1, 1, 4])]
        parts = [h[:, [3, 0, 0]], h[:, mask], h[..., ::2], h[:, 1:4] * corner]
        return self.head(torch.cat(parts, -1))


class WeightNorm(nn.Module):
    """Directions and lengths of weights apart, by a parametrisation (Salimans, Kingma, 2016)."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = weight_norm(nn.Linear(INPUTS, WIDTH)), weight_norm(nn.Linear(WIDTH, 2))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.relu(self.body(x)))


class MixtureDensity(nn.Module):
    """A mixture of Gaussians: logits, means and positive scales, joined in one output (Bishop,
    1994)."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.heads = nn.Linear(INPUTS, WIDTH), nn.Linear(WIDTH, 6)

    def forward(self, x: Tensor) -> Tensor:
        logits, means, scales = self.heads(torch.tanh(self.body(x))).unflatten(-1, (3, 2)).unbind(1)
        log_p = logits.log_softmax(-1) - F.softplus(scales).log() - 0.5 * (means - x[:, :1]) ** 2
        return torch.logsumexp(log_p, -1, keepdim=True)


class OneHot(nn.Module):
    """Ids as one-hot vectors, side by side, into an MLP."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(FIELDS * ENTRIES, WIDTH), nn.Linear(WIDTH, 3)

    def forward(self, ids: Tensor) -> Tensor:
        hot = F.one_hot(ids, ENTRIES).to(self.body.weight.dtype)
        return self.head(F.celu(self.body(hot.flatten(1))))


class SumProduct(nn.Module):
    """Sums of products of Gaussian densities, in logarithms (Poon, Domingos, 2011)."""

    def __init__(self) -> None:
        super().__init__()
        self.means = nn.Parameter(torch.randn(INPUTS, WIDTH))
        self.weights = nn.Parameter(torch.randn(2, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        leaves = torch.exp(-((x[:, :, None] - self.means) ** 2) / 8).prod(1)
        return torch.log(leaves @ self.weights.softmax(1).T)


_ROW = (INPUTS,)

CASES = (
    small("factorisation_machine", FactorisationMachine, (FIELDS,), ids=ENTRIES, lr=0.02),
    small("deep_fm", DeepFm, (FIELDS,), loss="bce", ids=ENTRIES, lr=0.02, kinks=True),
    small("cross_network", CrossNetwork, _ROW),
    small("embedding_bag", Bags, (FIELDS,), loss="ce", ids=ENTRIES),
    small("two_towers", TwoTowers, (2,), ids=ENTRIES),
    small("bilinear", Bilinear, _ROW),
    small("kan", lambda: nn.Sequential(Kan(INPUTS, WIDTH), Kan(WIDTH, 2)), _ROW, kinks=True),
    small("fourier_features", FourierFeatures, _ROW),
    small("radial_basis", RadialBasis, _ROW),
    small("tied_autoencoder", TiedAutoencoder, _ROW),
    small("shared_twice", SharedTwice, _ROW),
    small("permuted", Permuted, _ROW),
    small("one_hot", OneHot, (FIELDS,), loss="ce", ids=ENTRIES, kinks=True),
    small("sum_product", SumProduct, _ROW),
    small("indexed", Indexed, _ROW),
    small("weight_norm", WeightNorm, _ROW, kinks=True),
    small("mixture_density", MixtureDensity, _ROW),
)
