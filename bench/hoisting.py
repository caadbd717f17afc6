"""Partly adapted networks beside the same done by hand, and one task a call beside the plain
autograd loop.

    python bench/hoisting.py [--threads 1]

Three tables. ANIL (`adapt="head"`) of Conv4 at the size of Omniglot on the `cpu` backend: as it
runs, in one piece, and
by hand, features first and the inner loop on them. ANIL of a transformer on the `torch` backend: as
it runs, and the autograd loop on features that are computed once. All parameters of three networks,
one task and four tasks in a
loop on the `torch` backend: as it runs, and the autograd loop. Times are of the processor, medians
and minima of blocks
that take turns, on one thread by default: other programs on the machine hardly change their ratios.
"""

from __future__ import annotations

import copy
import math
import statistics
import time
from collections.abc import Callable, Mapping

import click
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

import fastmeta as fm
from fastmeta.backends import _hoisting

RATE = 0.01
Step = Callable[[], object]
Episode = tuple[Tensor, Tensor, Tensor, Tensor]


class Lstm(nn.Module):
    """[N, S, 8] -> [N, 1]."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.LSTM(8, 32, batch_first=True), nn.Linear(32, 1)

    def forward(self, x: Tensor) -> Tensor:
        """The head on the last hidden state."""
        return self.head(self.body(x)[0][:, -1])


class Transformer(nn.Module):
    """[N, S, 8] -> [N, 1]."""

    def __init__(self, width: int = 32, layers: int = 1) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(width, 4, 2 * width, 0.0, batch_first=True)
        self.embed = nn.Linear(8, width)
        self.body = nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)
        self.head = nn.Linear(width, 1)  # the last of the layers: what adapt="head" means

    def features(self, x: Tensor) -> Tensor:
        """[N, width]."""
        return self.body(self.embed(x)).mean(1)

    def forward(self, x: Tensor) -> Tensor:
        """The head on the mean over places."""
        return self.head(self.features(x))


def conv4() -> nn.Sequential:
    """28 x 28 -> 5 classes, 64 filters; a body and a head."""
    blocks: list[nn.Module] = []
    for inputs in (1, 64, 64, 64):
        blocks += [nn.Conv2d(inputs, 64, 3, padding=1), nn.BatchNorm2d(64), nn.ReLU(), nn.MaxPool2d(2)]
    return nn.Sequential(nn.Sequential(*blocks, nn.Flatten()), nn.Linear(64, 5))


def custom_loss(output: Tensor, target: Tensor) -> Tensor:
    """One without a name: it keeps the network off the `cpu` backend."""
    return ((output - target) ** 2).mean()


def timed(ways: Mapping[str, Step], blocks: int = 5, calls: int = 6) -> dict[str, tuple[float, float]]:
    """Median and minimum of each in milliseconds; the first two calls of a block do not count."""
    times: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(blocks):
        for name, way in ways.items():
            for call in range(calls):
                start = time.process_time()
                way()
                if call > 1:
                    times[name].append(1e3 * (time.process_time() - start))
    return {name: (statistics.median(values), min(values)) for name, values in times.items()}


def line(what: str, ways: Mapping[str, Step]) -> None:
    """Print the times, and the ratios to those of the last one."""
    found = timed(ways)
    median, least = found[[*ways][-1]]
    parts = [
        f"{name} {m:8.2f} ({n:.2f}) ms x{m / median:.2f} (x{n / least:.2f})" for name, (m, n) in found.items()
    ]
    click.echo(f"{what:24}  " + "   ".join(parts))


def anil_on_cpu(steps: int, tasks: int = 4, shots: int = 5, queries: int = 25) -> None:
    """Conv4's head."""
    nets = {"ours": conv4()}
    nets["one piece"] = copy.deepcopy(nets["ours"])
    body, head = nets["ours"]
    x, query_x = torch.rand(tasks, shots, 1, 28, 28), torch.rand(tasks, queries, 1, 28, 28)
    y, query_y = torch.arange(shots).expand(tasks, -1), torch.randint(5, (tasks, queries))
    options = {"loss": "cross_entropy", "lr": RATE, "steps": steps}

    def whole(net: nn.Module, worth: float) -> Step:
        params = {name: value.detach() for name, value in net.named_parameters()}

        def call() -> object:
            before, _hoisting.WORTH["cpu"] = _hoisting.WORTH["cpu"], worth
            try:
                return fm.meta_gradient(net, params, (x, y), (query_x, query_y), adapt="head", **options)
            finally:
                _hoisting.WORTH["cpu"] = before

        return call

    def by_hand() -> object:
        own = dict(body.named_parameters())
        features, query_features = fm.task_forward(body, own, x), fm.task_forward(body, own, query_x)
        found = fm.meta_gradient(
            head,
            {name: value.detach() for name, value in head.named_parameters()},
            (features.detach(), y),
            (query_features.detach(), query_y),
            wrt=("params", "support_x", "query_x"),
            **options,
        )
        return torch.autograd.grad(
            [features, query_features], [*own.values()], [found.support_x, found.query_x]
        )

    ways = {
        name: whole(net, _hoisting.WORTH["cpu"] if name == "ours" else math.inf) for name, net in nets.items()
    }
    line(f"Conv4 head, T={tasks} K={steps}", {**ways, "by hand": by_hand})


def loop(net: nn.Module, episode: Episode, steps: int) -> None:
    """The plain autograd loop over all parameters."""
    params, total = dict(net.named_parameters()), torch.zeros(())
    with sdpa_kernel(SDPBackend.MATH):
        for x, y, query_x, query_y in zip(*episode, strict=True):
            theta = dict(params)
            for _ in range(steps):
                loss = custom_loss(functional_call(net, theta, (x,)), y)
                grads = torch.autograd.grad(loss, [*theta.values()], create_graph=True)
                theta = {
                    name: value - RATE * g for (name, value), g in zip(theta.items(), grads, strict=True)
                }
            total = total + custom_loss(functional_call(net, theta, (query_x,)), query_y)
        (total / len(episode[0])).backward()


def head_loop(net: Transformer, episode: Episode, steps: int) -> None:
    """The autograd loop over the head, on features that are computed once."""
    total = torch.zeros(())
    with sdpa_kernel(SDPBackend.MATH):
        for x, y, query_x, query_y in zip(*episode, strict=True):
            features, query_features = net.features(x), net.features(query_x)
            theta = [net.head.weight, net.head.bias]
            for _ in range(steps):
                loss = custom_loss(F.linear(features, *theta), y)
                grads = torch.autograd.grad(loss, theta, create_graph=True)
                theta = [value - RATE * g for value, g in zip(theta, grads, strict=True)]
            total = total + custom_loss(F.linear(query_features, *theta), query_y)
        (total / len(episode[0])).backward()


def on_torch(name: str, net: nn.Module, shape: tuple[int, ...], tasks: int, steps: int, adapt: str) -> None:
    """A network that is run as it is."""
    sets = [torch.randn(tasks, 10, *shape), torch.randn(tasks, 10, 1)]
    episode = (*sets, *[torch.randn_like(tensor) for tensor in sets])
    options = {"inner_lr": RATE, "inner_steps": steps, "backend": "torch", "adapt": adapt}
    maml = fm.MAML(net, loss=custom_loss, task_chunk=1 if adapt == "all" else None, **options)
    plain = head_loop if adapt == "head" else loop
    ways = {"ours": lambda: maml(*episode).loss.backward(), "by hand": lambda: plain(net, episode, steps)}
    line(f"{name}, T={tasks} K={steps}", ways)


@click.command()
@click.option("--threads", default=1, help="PyTorch's and the engine's.")
def main(threads: int) -> None:
    """Print the three tables."""
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    click.echo('adapt="head", cpu backend')
    for steps in (1, 5, 20):
        anil_on_cpu(steps)
    click.echo('adapt="head", torch backend')
    for tasks in (1, 8):
        for steps in (1, 5, 20):
            on_torch("transformer head", Transformer(64, 2), (8, 8), tasks, steps, "head")
    click.echo('adapt="all", torch backend, a task at a time')
    mlp = nn.Sequential(nn.Linear(1, 40), nn.ReLU(), nn.Linear(40, 40), nn.ReLU(), nn.Linear(40, 1))
    for name, net, shape in (
        ("mlp", mlp, (1,)),
        ("lstm", Lstm(), (10, 8)),
        ("transformer", Transformer(), (8, 8)),
    ):
        for tasks in (1, 4):
            for steps in (1, 5):
                on_torch(name, net, shape, tasks, steps, "all")


if __name__ == "__main__":
    main()
