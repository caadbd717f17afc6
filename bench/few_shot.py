"""The algorithms that `bench/algorithms.py` compares, and their hyperparameters: the one place that
says them.

Network, episodes, number of iterations and, but for Reptile, Adam with rate 1e-3 are the same for
all. What is an algorithm's own comes from its paper or its authors' code, for 5-way 1-shot Omniglot
where that is an experiment there; what had to be chosen was chosen on alphabets of the training set
(`--validation`) and says so.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.lr_scheduler import CosineAnnealingLR, LambdaLR, LRScheduler

import fastmeta as fm
from fastmeta.data import Episode
from fastmeta.ops.divergence import check_diverged


class Budget(NamedTuple):
    """What is the same for all."""

    ways: int
    width: int  # filters
    iterations: int
    seed: int  # of the weights

    def network(self) -> fm.models.Conv4:
        """The same weights for every algorithm."""
        torch.manual_seed(self.seed)
        return fm.models.Conv4(self.ways, width=self.width, form="strided")


class Learner:
    """A network that an algorithm trains and adapts.

    Args:
        module: what is trained, an algorithm of fastmeta; Adam at 1e-3 is its optimiser.
        test_steps: inner steps in testing; None: those of training.
    """

    schedule: LRScheduler | None = None

    def __init__(self, module: nn.Module, test_steps: int | None = None) -> None:
        self.module, self.test_steps = module, test_steps
        self.optimizer: torch.optim.Optimizer = torch.optim.Adam(module.parameters(), lr=1e-3)

    def loss(self, episode: Episode, iteration: int) -> Tensor:
        """What is differentiated.

        Raises:
            FloatingPointError: tasks diverged; counts and names them.
        """
        return self.module(*episode).loss

    def predict(self, episode: Episode) -> Tensor:
        """Logits of the query sets, [T, M, C].

        Raises:
            FloatingPointError: as `loss`; otherwise the logits of tasks that diverged are not
                finite.
        """
        adapted = self.module.adapt(episode.support_x, episode.support_y, steps=self.test_steps)
        return self.module.predict(adapted, episode.query_x)

    def note(self) -> str:
        """What there is to say about the training; nothing if empty."""
        return ""


class MAMLPlusPlus(Learner):
    """The schedules of MAML++: its epochs have a share of the run that is that of the paper's."""

    epochs, multi_step_epochs = 20, 2

    def __init__(self, budget: Budget) -> None:
        module = fm.MAMLPlusPlus(
            budget.network(),
            loss="cross_entropy",
            inner_lr=0.1,
            inner_steps=5,
            multi_step_epochs=self.multi_step_epochs,
            first_order_epochs=0,
        )
        super().__init__(module)
        self.iterations = budget.iterations
        self.schedule = CosineAnnealingLR(self.optimizer, budget.iterations, eta_min=1e-5)

    def loss(self, episode: Episode, iteration: int) -> Tensor:
        self.module.set_epoch(iteration * self.epochs // self.iterations)
        return super().loss(episode, iteration)


class IMAML(Learner):
    """Counts the linear systems that are not solved, in place of the warnings."""

    def __init__(self, budget: Budget) -> None:
        super().__init__(
            fm.IMAML(
                budget.network(),
                loss="cross_entropy",
                inner_lr=0.1,
                inner_steps=16,
                proximal=2.0,
                cg_steps=5,
                cg_tolerance=0.1,
            )
        )
        self.systems = self.unsolved = 0

    def loss(self, episode: Episode, iteration: int) -> Tensor:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "IMAML: after", RuntimeWarning)
            out = self.module(*episode)
        self.systems += len(out.residuals)
        self.unsolved += int((out.residuals > self.module.cg_tolerance).sum())
        return out.loss

    def note(self) -> str:
        left = f"{self.unsolved} of {self.systems} linear systems of the training not solved to"
        return f"{left} {self.module.cg_tolerance:g}" if self.unsolved else ""


class Reptile(Learner):
    """Support and query drawings are one training set, of which every inner step takes a minibatch.

    The outer rate falls from 1 to 0. The inner loop is SGD, not the paper's Adam; its rate is the
    best of 0.03, 0.1, 0.3, 0.5 and 1 in 200 iterations with --validation: 29, 54, 72, 77 and 76 %.
    """

    batch, steps, rate = 10, 3, 0.5

    def __init__(self, budget: Budget) -> None:
        module = fm.Reptile(
            budget.network(), loss="cross_entropy", inner_lr=self.rate, inner_steps=self.steps
        )
        super().__init__(module, test_steps=5)
        self.optimizer = torch.optim.SGD(module.parameters(), lr=1.0)
        self.schedule = LambdaLR(self.optimizer, lambda iteration: 1 - iteration / budget.iterations)

    def loss(self, episode: Episode, iteration: int) -> Tensor:
        x = torch.cat((episode.support_x, episode.query_x), 1)  # [T, N + M, ...]
        y = torch.cat((episode.support_y, episode.query_y), 1)
        random = torch.Generator().manual_seed(iteration)
        passes = -(-self.steps * self.batch // x.shape[1])
        order = torch.cat([torch.randperm(x.shape[1], generator=random) for _ in range(passes)])
        chosen = order[: self.steps * self.batch].reshape(self.steps, self.batch)
        return self.module(x[:, chosen], y[:, chosen], support_per_step=True).loss


class Head(Learner):
    """Conv4's features and a head that is solved.

    Support and query drawings of a task pass the encoder in one batch, as in the authors' code.
    """

    def __init__(self, budget: Budget, head: nn.Module) -> None:
        encoder = budget.network()
        encoder.head = nn.Identity()
        super().__init__(nn.ModuleDict({"encoder": encoder, "head": head}))
        self.ways = budget.ways

    def loss(self, episode: Episode, iteration: int) -> Tensor:
        return F.cross_entropy(self.predict(episode).flatten(0, 1), episode.query_y.flatten())

    def predict(self, episode: Episode) -> Tensor:
        encoder, head = self.module["encoder"], self.module["head"]
        x = torch.cat((episode.support_x, episode.query_x), 1)
        features = fm.task_forward(encoder, dict(encoder.named_parameters()), x)  # [T, N + M, D]
        check_diverged("Conv4", "features are", [features])
        shots = episode.support_x.shape[1]
        try:
            return head(features[:, :shots], episode.support_y, features[:, shots:], ways=self.ways)
        except RuntimeError as error:  # systems that are singular, that do not converge or that overflow
            raise FloatingPointError(str(error)) from error


class FiLM(nn.Module):
    """x (1 + W_1 phi + b_1) + (W_2 phi + b_2) for every feature map: the form of context of CAVIA's
    classifiers."""

    def __init__(self, size: int, maps: int) -> None:
        super().__init__()
        self.phi = nn.Parameter(torch.zeros(size), requires_grad=False)
        self.linear = nn.Linear(size, 2 * maps)

    def forward(self, x: Tensor) -> Tensor:
        """[N, C, H, W] -> [N, C, H, W]."""
        scale, shift = self.linear(self.phi)[:, None, None].chunk(2)
        return x * (1 + scale) + shift


class Algorithm(NamedTuple):
    """A row of the table."""

    settings: str
    source: str
    learner: Callable[[Budget], Learner]


def _plain(
    algorithm: Callable[..., nn.Module], source: str, rate: float, steps: int, test_steps: int
) -> Algorithm:
    """A row that differs from MAML's by the algorithm and its numbers."""

    def learner(budget: Budget) -> Learner:
        module = algorithm(budget.network(), loss="cross_entropy", inner_lr=rate, inner_steps=steps)
        return Learner(module, test_steps)

    return Algorithm(f"rate {rate:g}, {steps} inner step, {test_steps} in testing", source, learner)


def _meta_sgd(budget: Budget) -> Learner:
    net = budget.network()
    rates = {name: torch.empty(1, 1, *p.shape).uniform_(0.005, 0.1) for name, p in net.named_parameters()}
    return Learner(fm.MetaSGD(net, loss="cross_entropy", inner_lr=rates, inner_steps=1))


def _cavia(budget: Budget) -> Learner:
    net = budget.network()
    net.blocks[2].insert(2, FiLM(100, budget.width))
    options = {"loss": "cross_entropy", "inner_lr": 1.0, "inner_steps": 2, "context": ["*.phi"]}
    return Learner(fm.CAVIA(net, **options))


def _head(head: Callable[[], nn.Module]) -> Callable[[Budget], Learner]:
    return lambda budget: Head(budget, head())


#: Name -> how it is trained and tested, and where that is from.
ALGORITHMS: dict[str, Algorithm] = {
    "MAML": _plain(fm.MAML, "Finn et al. 2017, A.1", 0.4, 1, 3),
    "FOMAML": _plain(fm.FOMAML, "Finn et al. 2017, A.1", 0.4, 1, 3),
    "ANIL": _plain(fm.ANIL, "Raghu et al. 2020: as MAML", 0.4, 1, 3),
    "BOIL": _plain(fm.BOIL, "Oh et al. 2021: mini-ImageNet", 0.5, 1, 1),
    "Meta-SGD": Algorithm("rates from U(0.005, 0.1), 1 inner step", "Li et al. 2017, section 3", _meta_sgd),
    "MAML++": Algorithm(
        "rates from 0.1, 5 inner steps, multi-step loss in the first tenth, second order throughout, Adam's "
        "rate 1e-3 to 1e-5 by a cosine",
        "Antoniou et al. 2019: code, Omniglot",
        MAMLPlusPlus,
    ),
    "CAVIA": Algorithm(
        "FiLM by 100 context parameters in the third block, rate 1, 2 inner steps",
        "Zintgraf et al. 2019: code, mini-ImageNet",
        _cavia,
    ),
    "iMAML": Algorithm(
        "rate 0.1, 16 inner steps, lambda 2, 5 conjugate-gradient steps",
        "Rajeswaran et al. 2019: code, Omniglot",
        IMAML,
    ),
    "Reptile": Algorithm(
        "rate 0.5, 3 inner steps on minibatches of 10, 5 in testing on the support set, "
        "outer SGD's rate 1 to 0",
        "Nichol et al. 2018: code, Omniglot; inner SGD for Adam",
        Reptile,
    ),
    "Meta-Curvature": _plain(fm.MetaCurvature, "Park and Oliva 2019, from the identity; as MAML", 0.4, 1, 3),
    "ridge": Algorithm(
        "penalty, scale and shift learned from 1, 1, 0", "Bertinetto et al. 2019", _head(fm.heads.Ridge)
    ),
    "logistic": Algorithm("penalty learned from 1", "Bertinetto et al. 2019", _head(fm.heads.Logistic)),
    "prototypes": Algorithm("scale learned from 1", "Snell et al. 2017", _head(fm.heads.Prototypes)),
}
