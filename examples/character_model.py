"""Which sources of text to train a language model on: their weights by metagradients through 150
steps of AdamW, with memory="checkpoint".

`python examples/character_model.py [--steps 150] [--rounds 8] [--seed 0]
[--out runs/character_model]`; needs matplotlib for the plot.

A transformer of one block predicts the next character. It is to write docstrings; the text comes
from Python's standard library. Each minibatch has as many sequences from every source: docstrings,
code, docstrings backwards, and docstrings whose characters are shuffled. How much each source
counts in the loss of the training is learned, from equal weights, to lower the loss on docstrings
of other modules. Nothing else says which source is of use.

Docstrings of modules that no metagradient has seen are the test: trainings from new
initialisations, with equal weights, the learned ones, and on docstrings alone.

What to expect: nearly all of the weight goes to the docstrings, that of code last. The loss is 2.67
nats a character, that of docstrings alone; equal weights give 2.89, and the frequencies of the
characters without a model 3.07. Memory "checkpoint" keeps 12 copies of the parameters and Adam's
moments, in place of 150, and takes less than twice the time of "recompute" on the `torch` backend.
Where all of them fit, "recompute" on the backend that "auto" takes is much faster once the module
is traced.

Source: Fan, Pagliardini, Jaggi, "DoGE: Domain Reweighting with Generalization Estimation" (2024),
for weights of sources by gradients, of one step there.
"""

from __future__ import annotations

import ast
import csv
import time
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import click
import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor, nn
from torch.nn import functional as F

import fastmeta as fm

TRAIN = "argparse calendar cmd configparser copy csv difflib doctest fractions ftplib gettext imaplib inspect"
VALIDATION = "smtplib socketserver statistics subprocess heapq"
TEST = "tarfile textwrap threading traceback weakref"
ALPHABET = "\n !\"#'()*,-./0123456789:=>_abcdefghijklmnopqrstuvwxyz"
LENGTH, EACH, HELD_OUT = 24, 4, 128  # characters of a sequence; sequences of a source, of a held-out set
WIDTH, HEADS, RATE = 32, 2, 0.01
# With eps_root=1e-8 the deviation of a metagradient is ten times as large, and several times its
# mean: where gradients are almost zero, the root of Adam has large derivatives.
RULE = fm.AdamW(weight_decay=0.01, eps_root=1e-6)


class Result(NamedTuple):
    """What `main` finds."""

    weights: dict[str, float]  # source -> its learned weight; their mean is 1
    losses: dict[str, float]  # weights of the training -> loss on test docstrings, nats a character


class Model(nn.Module):
    """A transformer of one block: characters [N, LENGTH] -> logits [N, characters, LENGTH]."""

    def __init__(self) -> None:
        super().__init__()
        characters = len(ALPHABET) + 1  # and one for all others
        self.character, self.place = nn.Embedding(characters, WIDTH), nn.Embedding(LENGTH, WIDTH)
        self.attend, self.query_key_value = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 3 * WIDTH)
        self.mixed = nn.Linear(WIDTH, WIDTH)
        self.think = nn.Sequential(
            nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 2 * WIDTH), nn.GELU(), nn.Linear(2 * WIDTH, WIDTH)
        )
        self.out = nn.Sequential(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, characters))

    def forward(self, x: Tensor) -> Tensor:
        h = self.character(x) + self.place.weight
        heads = self.query_key_value(self.attend(h)).unflatten(-1, (3, HEADS, -1))  # [N, LENGTH, 3, HEADS, D]
        query, key, value = heads.permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        h = h + self.mixed(mixed.transpose(1, 2).flatten(2))
        h = h + self.think(h)
        return self.out(h).transpose(1, 2)


def read(modules: str) -> tuple[str, str]:
    """The docstrings of these modules, and their code without them."""
    docstrings, code = [], []
    for name in modules.split():
        tree = ast.parse(Path(find_spec(name).origin).read_text(encoding="utf-8"))
        for node in ast.walk(tree):
            if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)) and ast.get_docstring(node):
                docstrings.append(" ".join(ast.get_docstring(node).split()))
                node.body = node.body[1:] or [ast.Pass()]
        code.append(ast.unparse(tree))
    return "\n".join(docstrings), "\n".join(code)


def encoded(text: str) -> Tensor:
    return torch.tensor([ALPHABET.find(character) + 1 for character in text.lower()])


def sources() -> dict[str, Tensor]:
    """What the model is trained on, characters by number."""
    docstrings, code = map(encoded, read(TRAIN))
    return {
        "docstrings": docstrings,
        "code": code,
        "backwards": docstrings.flip(0),
        "shuffled": docstrings[torch.randperm(len(docstrings))],
    }


def cut(text: Tensor, *shape: int) -> tuple[Tensor, Tensor]:
    """Sequences from anywhere in a text, and what follows each of their characters, [*shape,
    LENGTH]."""
    start = torch.randint(len(text) - LENGTH, shape)
    found = text[start[..., None] + torch.arange(LENGTH + 1)]
    return found[..., :-1], found[..., 1:]


def minibatches(texts: dict[str, Tensor], steps: int) -> tuple[Tensor, Tensor]:
    """[1, steps, sequences, LENGTH], `EACH` sequences of every source side by side."""
    parts = [cut(text, 1, steps, EACH) for text in texts.values()]
    return torch.cat([x for x, _ in parts], 2), torch.cat([y for _, y in parts], 2)


def training(steps: int, memory: str) -> fm.MAML:
    """A new model that is to be trained for so many steps."""
    return fm.MAML(
        Model(), loss="cross_entropy", inner_lr=RATE, inner_steps=steps, update_rule=RULE, memory=memory
    )


def restart(maml: fm.MAML) -> None:
    """A new initialisation. The module stays: a new one would be traced anew."""
    maml.net.load_state_dict(Model().state_dict())


def of_sequences(weights: Tensor, steps: int) -> Tensor:
    """Weights of the sequences, [1, steps, sequences], of those of the sources."""
    return weights.repeat_interleave(EACH).expand(1, steps, -1)


def loss(maml: fm.MAML, texts: dict[str, Tensor], weights: Tensor, held_out: Tensor) -> Tensor:
    """The held-out loss after the training, differentiable in the weights of the sources."""
    steps = maml.inner_steps
    return maml(
        *minibatches(texts, steps),
        *cut(held_out, 1, HELD_OUT),
        support_weights=of_sequences(weights, steps),
        support_per_step=True,
    ).loss


def learn(texts: dict[str, Tensor], validation: Tensor, steps: int, rounds: int, console: Console) -> Tensor:
    """The weights of the sources before each metagradient and after the last, [rounds + 1,
    sources]."""
    logits = torch.zeros(len(texts), requires_grad=True)
    meta = torch.optim.Adam([logits], lr=0.5)
    path = [torch.ones(len(texts))]
    maml = training(steps, "checkpoint")
    for _ in track(range(rounds), "metagradients", console=console):
        weights = len(texts) * logits.softmax(0)
        meta.zero_grad()
        restart(maml)
        loss(maml, texts, weights, validation).backward()
        meta.step()
        path.append(len(texts) * logits.detach().softmax(0))
    return torch.stack(path)


def plot(path: Path, names: list[str], learned: Tensor) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(6, 3.5), layout="constrained")
    for name, weights in zip(names, learned.T.tolist(), strict=True):
        axes.plot(weights, marker=".", label=name)
    axes.set(xlabel="metagradients", ylabel="weight of the source")
    axes.legend()
    figure.savefig(path, dpi=150)
    plt.close(figure)


def main(
    steps: int = 150, rounds: int = 8, seed: int = 0, out: Path | None = None, repeats: int = 4
) -> Result:
    """Learn the weights, train with them, print tables, and write the weights and the plot to
    `out`."""
    torch.manual_seed(seed)
    console = Console()
    texts, validation, test = sources(), encoded(read(VALIDATION)[0]), encoded(read(TEST)[0])
    learned = learn(texts, validation, steps, rounds, console)

    alone = len(texts) * F.one_hot(torch.tensor(0), len(texts)).float()
    given = {"equal": learned[0], "learned": learned[-1], "docstrings alone": alone}
    table = Table("weights", *texts, "test losses")
    losses, maml = {}, training(steps, "recompute")
    for name, weights in given.items():
        torch.manual_seed(seed + 1)  # the same initialisations and minibatches
        found = []
        for _ in range(repeats):
            restart(maml)
            with torch.no_grad():
                found.append(loss(maml, texts, weights, test).item())
        losses[name] = sum(found) / repeats
        table.add_row(name, *(f"{w:.2f}" for w in weights), "  ".join(f"{one:.2f}" for one in found))
    console.print(table)
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        with (out / "weights.csv").open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow(("metagradients", *texts))
            writer.writerows((i, *row) for i, row in enumerate(learned.tolist()))
        plot(out / "weights.png", list(texts), learned)
    return Result(dict(zip(texts, learned[-1].tolist(), strict=True)), losses)


def compare(steps: int = 150, seed: int = 0) -> tuple[dict[str, float], float]:
    """Seconds of one metagradient, by what is kept on the `torch` backend, and on the one that
    "auto" takes; and the largest difference of any two over the largest element. Prints what they
    keep."""
    console, seconds, found = Console(), {}, []
    torch.manual_seed(seed)
    texts, validation = sources(), encoded(read(VALIDATION)[0])
    auto = training(steps, "recompute")
    ways = {name: training(steps, name) for name in ("recompute", "checkpoint")}
    for maml in ways.values():
        maml.backend = "torch"
    for name, maml in {**ways, "auto, first call": auto, "auto, next call": auto}.items():
        torch.manual_seed(seed)  # the same model and minibatches
        restart(maml)
        weights = torch.ones(len(texts), requires_grad=True)
        begin = time.perf_counter()
        loss(maml, texts, weights, validation).backward()
        seconds[name] = time.perf_counter() - begin
        found.append(weights.grad)
        console.print(f"{name}, {steps} steps: {seconds[name]:.1f} s", highlight=False)
    for maml in (ways["checkpoint"], auto):
        explanation = maml.explain(
            *minibatches(texts, steps),
            *cut(validation, 1, HELD_OUT),
            support_weights=of_sequences(weights, steps),
            support_per_step=True,
        )
        kept = [line for line in explanation.runs if line.startswith("memory")]
        console.print(f"{explanation.backend} backend,", *kept, highlight=False)
    spread = torch.stack(found).max(0).values - torch.stack(found).min(0).values
    return seconds, (spread.max() / found[0].abs().max()).item()


@click.command()
@click.option("--steps", default=150, show_default=True, help="Inner steps of AdamW.")
@click.option("--rounds", default=8, show_default=True, help="Metagradients.")
@click.option("--seed", default=0, show_default=True)
@click.option(
    "--out", type=click.Path(path_type=Path), default=Path("runs/character_model"), show_default=True
)
def command(steps: int, rounds: int, seed: int, out: Path) -> None:
    """Weights of sources of text for a language model, by metagradients through AdamW."""
    torch.set_num_threads(1)  # on tensors this small, more of them only wait for each other
    main(steps, rounds, seed, out)
    compare(steps, seed)


if __name__ == "__main__":
    command()
