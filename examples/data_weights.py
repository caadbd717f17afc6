"""Which training examples help: weights of examples by metagradients through 500 steps of AdamW.

`python examples/data_weights.py [--steps 500] [--rounds 10] [--seed 0] [--out runs/data_weights]`;
needs scikit-learn, and matplotlib for the plot.

One digit in ten has a wrong label. The gradient of the held-out loss by the weight of a training
example says whether more of that example would help or harm. A few rounds of that gradient, each
from a fresh initialisation, move the weights. Then the examples of the smallest weights are left
out, and a network is trained without them: its loss on a test set, which no gradient has seen, is
the check.

A gradient says what a small change of a weight does. A network that has learned its wrong labels
by heart gives gradients that say little; the rate is such that 500 steps do not go that far.

Source: Engstrom, Ilyas, Chen, Feldmann, Moses, Madry, "Optimizing ML Training with Metagradient
Descent" (2025).
"""

from __future__ import annotations

import csv
import time
from pathlib import Path
from typing import NamedTuple

import click
import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from sklearn.datasets import load_digits
from sklearn.metrics import roc_auc_score
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

import fastmeta as fm

TRAIN, HELD_OUT, BAD = 600, 800, 60
RATE = 1e-3
BETAS, DECAY, EPS = (0.9, 0.999), 0.01, 1e-8
# Not small: weights of pixels that are almost always zero have gradients so small that Adam makes a
# step of their sign alone. That hardly changes what is trained, but makes its derivative large.
EPS_ROOT = 1e-4

Set = tuple[Tensor, Tensor]  # digits [N, 64] and labels [N]


class Result(NamedTuple):
    """What `main` finds."""

    auc_first: float  # of finding the wrong labels by one metagradient
    auc: float  # by the weights after all rounds
    auc_loss: float  # by the loss of each training example after training, which needs no metagradient
    test: dict[str, tuple[float, float]]  # left out -> loss and accuracy on the test set


def digits() -> tuple[Set, Tensor, Set, Set]:
    """The training set, which of its labels are wrong, the held-out set and the test set."""
    x, y = map(torch.from_numpy, load_digits(return_X_y=True))
    order = torch.randperm(len(y))
    x, y = x[order].float() / 16, y[order]
    train, held_out, test = (
        (x[part], y[part])
        for part in (slice(TRAIN), slice(TRAIN, TRAIN + HELD_OUT), slice(TRAIN + HELD_OUT, None))
    )
    bad = torch.zeros(TRAIN, dtype=torch.bool)
    bad[:BAD] = True
    wrong = (train[1] + torch.randint(1, 10, (TRAIN,))) % 10
    return (train[0], torch.where(bad, wrong, train[1])), bad, held_out, test


def network() -> nn.Sequential:
    return nn.Sequential(nn.Linear(64, 32), nn.Tanh(), nn.Linear(32, 10))


def metagradient(
    net: nn.Module, train: Set, held_out: Set, weights: Tensor, steps: int, wrt: tuple[str, ...]
) -> fm.MetaGradient:
    """The held-out loss of the network, trained from its parameters, and the gradient of that loss
    by the weights of the training examples."""
    (x, y), (held_x, held_y) = train, held_out
    return fm.meta_gradient(
        net,
        dict(net.named_parameters()),
        (x[None], y[None]),  # one task
        (held_x[None], held_y[None]),
        loss="cross_entropy",
        lr=RATE,
        steps=steps,
        update_rule=fm.AdamW(betas=BETAS, eps=EPS, weight_decay=DECAY, eps_root=EPS_ROOT),
        support_weights=weights[None],
        wrt=wrt,
    )


def plain_metagradient(net: nn.Module, train: Set, held_out: Set, weights: Tensor, steps: int) -> Tensor:
    """The same gradient by plain autograd, for its time."""
    b1, b2 = BETAS
    weights = weights.clone().requires_grad_()
    names = [name for name, _ in net.named_parameters()]
    theta = [value.detach().requires_grad_() for value in net.parameters()]
    m, v = [torch.zeros_like(value) for value in theta], [torch.zeros_like(value) for value in theta]
    for k in range(1, steps + 1):
        output = functional_call(net, dict(zip(names, theta, strict=True)), train[0])
        loss = (weights * F.cross_entropy(output, train[1], reduction="none")).mean()
        grads = torch.autograd.grad(loss, theta, create_graph=True)
        m = [b1 * a + (1 - b1) * g for a, g in zip(m, grads, strict=True)]
        v = [b2 * a + (1 - b2) * g * g for a, g in zip(v, grads, strict=True)]
        theta = [
            (1 - RATE * DECAY) * p - RATE * a / (1 - b1**k) / ((s / (1 - b2**k) + EPS_ROOT).sqrt() + EPS)
            for p, a, s in zip(theta, m, v, strict=True)
        ]
    output = functional_call(net, dict(zip(names, theta, strict=True)), held_out[0])
    return torch.autograd.grad(F.cross_entropy(output, held_out[1]), weights)[0]


def learn_weights(
    train: Set, held_out: Set, steps: int, rounds: int, console: Console
) -> tuple[Tensor, Tensor]:
    """The first metagradient and the weights after all rounds, both [N]."""
    weights, first = torch.ones(TRAIN), torch.zeros(TRAIN)
    for i in track(range(rounds), "metagradients", console=console):
        found = metagradient(network(), train, held_out, weights, steps, ("support_weights",))
        g = found.support_weights[0]
        first = g if i == 0 else first
        weights = (weights - 0.05 * g / g.square().mean().sqrt()).clamp(0, 1)
    return first, weights


def retrain(train: Set, test: Set, left_out: Tensor, steps: int) -> tuple[float, float]:
    """Loss and accuracy on the test set, means over four networks trained without some examples."""
    keep = torch.ones(TRAIN)
    keep[left_out] = 0
    found = [metagradient(network(), train, test, keep, steps, ()) for _ in range(4)]
    hits = [(one.output[0].argmax(-1) == test[1]).float().mean().item() for one in found]
    return sum(one.loss.item() for one in found) / 4, sum(hits) / 4


def own_loss(train: Set, steps: int) -> Tensor:
    """The loss of each training example after training on all of them, [N]."""
    output = metagradient(network(), train, train, torch.ones(TRAIN), steps, ()).output[0]
    return F.cross_entropy(output, train[1], reduction="none")


def plot(path: Path, bad: Tensor, weights: Tensor) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(6, 3.5), layout="constrained")
    axes.hist(
        [weights[~bad].tolist(), weights[bad].tolist()], bins=20, label=["right labels", "wrong labels"]
    )
    axes.set(xlabel="weight", ylabel="training examples", yscale="log")
    axes.legend()
    figure.savefig(path, dpi=150)
    plt.close(figure)


def main(steps: int = 500, rounds: int = 10, seed: int = 0, out: Path | None = None) -> Result:
    """Learn the weights, train without the worst examples, print a table, and write the weights and
    the plot to `out`."""
    torch.manual_seed(seed)
    console = Console()
    train, bad, held_out, test = digits()
    first, weights = learn_weights(train, held_out, steps, rounds, console)
    worst = weights.argsort()[:BAD]
    left_out = {
        "nothing": worst[:0],
        f"the {BAD} of the smallest weights": worst,
        f"{BAD} at random": torch.randperm(TRAIN)[:BAD],
        f"the {BAD} with wrong labels": bad.nonzero()[:, 0],
    }
    losses = {name: retrain(train, test, which, steps) for name, which in left_out.items()}
    result = Result(
        roc_auc_score(bad, first),
        roc_auc_score(bad, -weights),
        roc_auc_score(bad, own_loss(train, steps)),
        losses,
    )

    table = Table("left out in training", "test loss", "test accuracy")
    for name, (loss, accuracy) in losses.items():
        table.add_row(name, f"{loss:.3f}", f"{accuracy:.3f}")
    console.print(table)
    table = Table("wrong labels found by", "AUC")
    for name, auc in zip(
        ("one metagradient", f"{rounds} rounds", "own training loss"), result[:3], strict=True
    ):
        table.add_row(name, f"{auc:.3f}")
    console.print(table)
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        with (out / "weights.csv").open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow(("example", "wrong_label", "first_metagradient", "weight"))
            writer.writerows(zip(range(TRAIN), bad.tolist(), first.tolist(), weights.tolist(), strict=True))
        plot(out / "weights.png", bad, weights)
    return result


def compare(steps: int = 500, seed: int = 0) -> tuple[float, float, float]:
    """Seconds of one metagradient, by fastmeta and by plain autograd, and the largest difference of
    the two over the largest element."""
    torch.manual_seed(seed)
    train, _, held_out, _ = digits()
    given = network(), train, held_out, torch.ones(TRAIN), steps
    metagradient(*given, ("support_weights",))  # the first call captures the network
    times, found = [], []
    for run in (
        lambda: metagradient(*given, ("support_weights",)).support_weights[0],
        lambda: plain_metagradient(*given),
    ):
        begin = time.perf_counter()
        found.append(run())
        times.append(time.perf_counter() - begin)
    difference = ((found[0] - found[1]).abs().max() / found[1].abs().max()).item()
    table = Table(f"one metagradient, {steps} steps", "seconds")
    table.add_row("fastmeta", f"{times[0]:.2f}")
    table.add_row("plain autograd", f"{times[1]:.2f}")
    Console().print(table, f"largest difference: {difference:.1e} of the largest element")
    return times[0], times[1], difference


@click.command()
@click.option("--steps", default=500, show_default=True, help="Inner steps of AdamW.")
@click.option("--rounds", default=10, show_default=True, help="Metagradients.")
@click.option("--seed", default=0, show_default=True)
@click.option("--out", type=click.Path(path_type=Path), default=Path("runs/data_weights"), show_default=True)
def command(steps: int, rounds: int, seed: int, out: Path) -> None:
    """Which training examples help: weights of examples by metagradients through AdamW."""
    torch.set_num_threads(1)  # on tensors this small, more of them only wait for each other
    main(steps, rounds, seed, out)
    compare(steps, seed)


if __name__ == "__main__":
    command()
