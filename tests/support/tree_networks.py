"""Networks with inputs, targets or outputs that are more than one floating-point tensor, each with
data for some tasks, and MAML in plain PyTorch for any of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map

import fastmeta as fm

TASKS, WORDS = 3, 11


def draw(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def ints(most: int, *shape: int, seed: int) -> Tensor:
    return torch.randint(most, shape, generator=torch.Generator().manual_seed(seed))


def mask(*shape: int, seed: int) -> Tensor:
    """True where there is padding; never all of a row."""
    found = draw(*shape, seed=seed) > 0.3
    found[..., 0] = False
    return found


class Words(nn.Module):
    """Token ids [N, L] to classes."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.head = nn.Embedding(WORDS, 4), nn.Linear(4, 3)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.table(ids).tanh().mean(1))


class Columns(nn.Module):
    """Four integer columns, as of users and items, each with a table of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.tables = nn.ModuleList(nn.Embedding(WORDS, 3) for _ in range(4))
        self.body = nn.Sequential(nn.Linear(12, 5), nn.ReLU(), nn.Linear(5, 1))

    def forward(self, rows: Tensor) -> Tensor:  # [N, 4]
        return self.body(torch.cat([table(rows[:, at]) for at, table in enumerate(self.tables)], 1))


class Graph(nn.Module):
    """Node features and an adjacency matrix."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(3, 5), nn.Linear(5, 2)

    def forward(self, x: Tensor, adjacency: Tensor) -> Tensor:
        return adjacency @ self.second((adjacency @ self.first(x)).tanh())


class Edges(nn.Module):
    """Node features and a list of edges, [2, E], with a weight each."""

    def __init__(self) -> None:
        super().__init__()
        self.message, self.head = nn.Linear(3, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor, edges: Tensor, weights: Tensor) -> Tensor:
        sent = self.message(x)[edges[0]] * weights[:, None]
        return self.head(torch.zeros(len(x), 4, dtype=x.dtype).index_add(0, edges[1], sent).tanh())


class Mixed(nn.Module):
    """A dict of dense and of categorical features."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.head = nn.Embedding(WORDS, 3), nn.Linear(5, 1)

    def forward(self, batch: dict[str, Any]) -> Tensor:
        found = self.head(torch.cat((batch["dense"], self.table(batch["column"])), 1).sin())
        return found * batch["scale"]


class Pair(NamedTuple):
    left: Tensor
    right: Tensor


class Compared(nn.Module):
    """Two sets of examples through one body."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(3, 4), nn.Linear(4, 1)

    def forward(self, pair: Pair) -> Tensor:
        return self.head(self.body(pair.left).tanh() * self.body(pair.right).tanh())


class Named(nn.Module):
    """Arguments that have names, some of which are no tensors, and a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(3, 4), nn.Linear(4, 1)
        self.register_buffer("shift", draw(4, seed=5))

    def forward(
        self,
        x: Tensor,
        *,
        scale: Tensor,
        extra: list[Tensor],
        how: str = "no",
        power: float = 0,
        also: Any = 0,
    ) -> Tensor:
        assert how == "tanh"
        assert also is None
        return self.head((self.body(x) + self.shift).tanh()) * scale**power + extra[0].mean()


class Encoder(nn.Module):
    """PyTorch's own transformer."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(WORDS, 8)
        layer = nn.TransformerEncoderLayer(8, 2, 12, dropout=0.0, batch_first=True)
        self.core = nn.TransformerEncoder(layer, 1)
        self.head = nn.Linear(8, 3)

    def forward(self, ids: Tensor, src_key_padding_mask: Tensor | None = None) -> Tensor:
        return self.head(self.core(self.table(ids), src_key_padding_mask=src_key_padding_mask).mean(1))


class Bert(nn.Module):
    """Ids and a mask by name, positions in a buffer, two heads in a dict, and None beside them."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.places = nn.Embedding(WORDS, 6), nn.Embedding(8, 6)
        self.attention = nn.MultiheadAttention(6, 2, batch_first=True)
        self.norm, self.classes, self.value = nn.LayerNorm(6), nn.Linear(6, 3), nn.Linear(6, 1)
        self.register_buffer("positions", torch.arange(8))

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> dict[str, Any]:
        x = self.words(input_ids) + self.places(self.positions[: input_ids.shape[1]])
        x = self.norm(x + self.attention(x, x, x, key_padding_mask=attention_mask, need_weights=False)[0])
        first, logits = x[:, 0], self.classes(x[:, 0])
        return {
            "logits": logits,
            "value": self.value(first),
            "predicted": logits.argmax(1),
            "hidden_states": None,
        }


def both_heads(output: dict[str, Tensor], target: dict[str, Tensor]) -> Tensor:
    assert output["hidden_states"] is None
    values = F.mse_loss(output["value"], target["value"])
    return F.cross_entropy(output["logits"], target["labels"]) + values


class Recurrent(nn.Module):
    """What an LSTM returns."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.core = nn.Linear(3, 3), nn.LSTM(3, 4, batch_first=True)

    def forward(self, x: Tensor, state: tuple[Tensor, Tensor]) -> Any:
        return self.core(self.first(x).tanh(), state)


def last_output(output: tuple[Tensor, Any], target: Tensor) -> Tensor:
    return F.mse_loss(output[0][:, -1], target) + 0.1 * output[1][1].square().mean()


class Padded(nn.Module):
    """Series of different lengths, which no vmap can pack."""

    def __init__(self) -> None:
        super().__init__()
        self.core, self.head = nn.GRU(3, 4, batch_first=True), nn.Linear(4, 1)

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        packed = nn.utils.rnn.pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
        return self.head(self.core(packed)[1][0])


class Tree(NamedTuple):
    """A network, and how data for it is made: number of examples and seed -> (x, y)."""

    make: Callable[[], nn.Module]
    data: Callable[[int, int], tuple[Any, Any]]
    loss: Any = "mse"


def _graph(n: int, seed: int) -> tuple[Any, Any]:
    adjacency = draw(TASKS, n, n, seed=seed + 1).softmax(2)
    return (draw(TASKS, n, 3, seed=seed), adjacency), draw(TASKS, n, 2, seed=seed + 2)


def _edges(n: int, seed: int) -> tuple[Any, Any]:
    x, weights = draw(TASKS, n, 3, seed=seed), draw(TASKS, 9, seed=seed + 1)
    edges = ints(n, TASKS, 2, 9, seed=seed)
    return fm.Inputs(x, edges=edges, weights=weights), draw(TASKS, n, 2, seed=seed + 2)


def _mixed(n: int, seed: int) -> tuple[Any, Any]:
    x = {"column": ints(WORDS, TASKS, n, seed=seed), "dense": draw(TASKS, n, 2, seed=seed)}
    return x | {"scale": draw(TASKS, seed=seed + 3)}, draw(TASKS, n, 1, seed=seed + 2)


def _named(n: int, seed: int) -> tuple[Any, Any]:
    extra = [draw(TASKS, 2, 5, seed=seed + 1)]
    scale = draw(TASKS, n, 1, seed=seed).square() + 0.5
    x = fm.Inputs(draw(TASKS, n, 3, seed=seed), scale=scale, extra=extra, how="tanh", power=1.5, also=None)
    return x, draw(TASKS, n, 1, seed=seed + 2)


def _bert(n: int, seed: int) -> tuple[Any, Any]:
    x = fm.Inputs(ints(WORDS, TASKS, n, 5, seed=seed), attention_mask=mask(TASKS, n, 5, seed=seed))
    labels = ints(3, TASKS, n, seed=seed + 1)
    return x, {"labels": labels, "value": draw(TASKS, n, 1, seed=seed + 2)}


def _recurrent(n: int, seed: int) -> tuple[Any, Any]:
    state = draw(TASKS, 1, n, 4, seed=seed + 1), draw(TASKS, 1, n, 4, seed=seed + 2)
    return (draw(TASKS, n, 3, 3, seed=seed), state), draw(TASKS, n, 4, seed=seed + 3)


def _padded(n: int, seed: int) -> tuple[Any, Any]:
    lengths = 1 + ints(4, TASKS, n, seed=seed)
    return (draw(TASKS, n, 4, 3, seed=seed), lengths), draw(TASKS, n, 1, seed=seed + 3)


TREES = {
    "ids": Tree(
        Words,
        lambda n, seed: (ints(WORDS, TASKS, n, 5, seed=seed), ints(3, TASKS, n, seed=seed + 1)),
        "cross_entropy",
    ),
    "columns": Tree(
        Columns, lambda n, seed: (ints(WORDS, TASKS, n, 4, seed=seed), draw(TASKS, n, 1, seed=seed))
    ),
    "graph": Tree(Graph, _graph),
    "edges": Tree(Edges, _edges),
    "dict": Tree(Mixed, _mixed),
    "named tuple": Tree(
        Compared,
        lambda n, seed: (
            Pair(draw(TASKS, n, 3, seed=seed), draw(TASKS, n, 3, seed=seed + 1)),
            draw(TASKS, n, 1, seed=seed + 2),
        ),
    ),
    "keywords": Tree(Named, _named),
    "encoder": Tree(
        Encoder,
        lambda n, seed: (
            fm.Inputs(ints(WORDS, TASKS, n, 5, seed=seed), src_key_padding_mask=mask(TASKS, n, 5, seed=seed)),
            ints(3, TASKS, n, seed=seed + 1),
        ),
        "cross_entropy",
    ),
    "bert": Tree(Bert, _bert, both_heads),
    "lstm": Tree(Recurrent, _recurrent, last_output),
    "lengths": Tree(Padded, _padded),
}


def built(name: str, seed: int = 0) -> tuple[nn.Module, tuple[Any, Any], tuple[Any, Any], Any]:
    """(the network, the support sets, the query sets, the loss)."""
    tree = TREES[name]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net = tree.make().double()
    return net, tree.data(4, 10 * seed + 1), tree.data(5, 10 * seed + 5), tree.loss


def parts(x: Any) -> Any:
    """What PyTorch's own trees know."""
    return (x.args, x.kwargs) if isinstance(x, fm.Inputs) else x


def tensors(*trees: Any) -> list[Tensor]:
    return [leaf for tree in trees for leaf in tree_leaves(parts(tree)) if isinstance(leaf, Tensor)]


def mapped_tree(function: Callable[..., Any], *trees: Any) -> Any:
    """A tree with `function(tensor, ...)` in the places of its tensors."""

    def one(leaf: Any, *others: Any) -> Any:
        return function(leaf, *others) if isinstance(leaf, Tensor) else leaf

    mapped = tree_map(one, *map(parts, trees))
    return fm.Inputs(*mapped[0], **mapped[1]) if isinstance(trees[0], fm.Inputs) else mapped


def required(x: Any) -> Any:
    """The same, its floating-point tensors leaves that require grad."""

    def one(leaf: Tensor) -> Tensor:
        return leaf.detach().clone().requires_grad_() if leaf.is_floating_point() else leaf

    return mapped_tree(one, x)


def of_task(x: Any, *at: int) -> Any:
    return mapped_tree(lambda leaf: leaf[at], x)


class _PlainNorms(TorchFunctionMode):
    """The third derivative of PyTorch's own layer norm is wrong."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return (_layer_norm if func is F.layer_norm else func)(*args, **(kwargs or {}))


def _layer_norm(x: Tensor, shape: Any, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    return centred * (centred.square().mean(-1, keepdim=True) + eps).rsqrt() * weight + bias


def called(net: nn.Module, theta: dict[str, Tensor], x: Any) -> Any:
    """The network on the inputs of one task."""
    with sdpa_kernel(SDPBackend.MATH), _PlainNorms():  # others have no second derivative
        if isinstance(x, fm.Inputs):
            return functional_call(net, theta, x.args, x.kwargs)
        return functional_call(net, theta, x if type(x) is tuple else (x,))


def function_of(loss: Any) -> Callable[[Any, Any], Tensor]:
    return {"mse": F.mse_loss, "cross_entropy": F.cross_entropy}.get(loss, loss)


def adapted(
    net: nn.Module, theta: dict[str, Tensor], x: Any, y: Any, loss: Any, lr: float, steps: int
) -> dict[str, Tensor]:
    """theta_K of one task; with a set for each step where x is a list of them."""
    for _ in range(steps):
        value = function_of(loss)(called(net, theta, x), y)
        grads = torch.autograd.grad(value, [*theta.values()], create_graph=True)
        theta = {name: v - lr * g for (name, v), g in zip(theta.items(), grads, strict=True)}
    return theta


def losses_of(
    net: nn.Module, params: dict[str, Tensor], support: Any, query: Any, loss: Any, lr: float, steps: int
) -> Tensor:
    """Query losses [T], with their graph."""
    found = []
    for task in range(TASKS):
        (x, y), (query_x, query_y) = (
            (of_task(part[0], task), of_task(part[1], task)) for part in (support, query)
        )
        theta = adapted(net, params, x, y, loss, lr, steps)
        found.append(function_of(loss)(called(net, theta, query_x), query_y))
    return torch.stack(found)


def error(got: Tensor, want: Tensor) -> float:
    """Relative."""
    return float((got.detach() - want.detach()).norm() / want.detach().norm().clamp_min(1e-12))
