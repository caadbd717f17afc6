"""MAML++: MAML with learned rates per layer and step, step losses, annealing and norms of their own
for every step."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from fastmeta.algorithms.maml import MAML, MetaLoss
from fastmeta.algorithms.rule_chain import RuleChain
from fastmeta.algorithms.stepwise import Stepwise, StepwiseMachinery, support_of
from fastmeta.models.check import check_count
from fastmeta.network.swap import locked
from fastmeta.ops.adapted import BY_GRAD, adapted_names
from fastmeta.ops.checks import Tensors
from fastmeta.ops.inner_sgd import inner_loop
from fastmeta.ops.options import Adapt, Options, argument, check_flag, names_of
from fastmeta.ops.rates import Rates, at_step
from fastmeta.ops.rule_numbers import hyper_at

if TYPE_CHECKING:
    from fastmeta.explain import Explanation

_NORMS = (nn.modules.batchnorm._NormBase, nn.LayerNorm, nn.GroupNorm)


class MAMLPlusPlus(Stepwise):
    """MAML++, "how to train your MAML".

        maml = fm.MAMLPlusPlus(
            net, loss="cross_entropy", inner_lr=0.1, inner_steps=5,
            multi_step_epochs=10, first_order_epochs=50
        )
        opt = torch.optim.Adam(maml.parameters(), lr=1e-3)
        # the outer schedule
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(opt, T_max=epochs, eta_min=1e-5)
        for epoch in range(epochs):
            maml.set_epoch(epoch)
            ...  # maml(*episode).loss.backward(), opt.step() as with MAML
            schedule.step()

    - Learned rates for every parameter tensor and inner step (`learn_lr`, `lr_per_step`).
    - Multi-step loss: in the first epochs the query loss after every inner step counts,
      `step_weights` says how much; the last one's share grows from epoch to epoch.
    - Derivative-order annealing: the first epochs are first order.
    - Weights and biases of norms are of their own for every inner step, and no inner step adapts
      them. Those of the network belong to the first step, those of steps 2 .. K are in `extra`, [K
      - 1, *shape]; query losses after k steps use those of step k. Steps are then engine calls
      chained by autograd; without norms, or without `per_step_norms`, the whole meta-step is one
      engine call, as in MAML.

    Running statistics for every step are left out: with batch_stats="task", as in the authors'
    code, every batch is normalised by itself and they are never read; batch_stats="running" reads
    the network's own at every step.

    Args:
        net, loss, query_loss, weight_norm, memory, batch_stats, backend, on_divergence: as in
            `fastmeta.MAML`.
        inner_lr: where the rates start.
        inner_steps: K, at least 1.
        multi_step_epochs: epochs with a multi-step loss; 0: none.
        first_order_epochs: epochs of first order; 0: none.
        per_step_norms: whether norms have parameters of their own for every step.
        adapt: as in `fastmeta.MAML`; with `per_step_norms` without the norms.
        learn_lr, lr_per_step: as in `fastmeta.MAML`.
        update_rule: as in `fastmeta.MAML`. Where steps are calls of their own, one with a state
            runs in PyTorch, on the gradient of each step.

    Raises:
        TypeError, ValueError: an argument does not fit; the message names it.

    Source: Antoniou, Edwards, Storkey, "How to train your MAML" (2019), section 4.
    """

    who = "MAMLPlusPlus"

    @locked
    def __init__(
        self,
        net: nn.Module,
        *,
        loss: object,
        inner_lr: Rates,
        inner_steps: int,
        multi_step_epochs: int,
        first_order_epochs: int,
        per_step_norms: bool = True,
        adapt: Adapt = "all",
        learn_lr: str | None = "tensor",
        lr_per_step: bool = True,
        **options: Any,
    ) -> None:
        for name in ("order", "step_weights"):
            if name in options:
                raise TypeError(f"{self.who}: `{name}` is no argument, `set_epoch` sets it")
        check_flag(self.who, "per_step_norms", per_step_norms)
        for name, count in {
            "multi_step_epochs": multi_step_epochs,
            "first_order_epochs": first_order_epochs,
        }.items():
            check_count(f"{self.who}: `{name}`", count, 0)
        check_count(argument(self.who, "steps"), inner_steps, 1)
        norms = _norm_parameters(net) if per_step_norms and isinstance(net, nn.Module) else {}
        asked: str | tuple[str, ...] = "all"
        if norms:
            asked = names_of(self.who, net, adapt)
            adapt = [name for name in adapted_names(self.who, net, asked) if name not in norms]
        super().__init__(
            net,
            loss=loss,
            inner_lr=inner_lr,
            inner_steps=inner_steps,
            adapt=adapt,
            learn_lr=learn_lr,
            lr_per_step=lr_per_step,
            **options,
        )
        keys = {name: name.replace(".", "__") for name in norms}
        if inner_steps > 1:
            for name, value in norms.items():
                copies = value.detach().expand(inner_steps - 1, *value.shape).clone()
                self.extra[keys[name]] = nn.Parameter(copies, requires_grad=value.requires_grad)
        self.multi_step_epochs = multi_step_epochs
        self.first_order_epochs = first_order_epochs
        self.set_epoch(0)
        self._machinery = _PerStepNorms(self, asked, keys)

    def set_epoch(self, epoch: int) -> None:
        """Set `order` and `step_weights` to those of an epoch; to be called at its start.

        Args:
            epoch: at least 0; the first one is 0, which a new module starts with.

        Raises:
            TypeError, ValueError: no int, or a negative one.
        """
        check_count(f"{self.who}.set_epoch: `epoch`", epoch, 0)
        self.order = "first" if epoch < self.first_order_epochs else "second"
        self.step_weights = None
        if epoch < self.multi_step_epochs:
            self.step_weights = step_weights(self.inner_steps, epoch, self.multi_step_epochs)

    def forward(self, *args: Any, **kwargs: Any) -> MetaLoss:
        """Query losses after the inner loop; arguments, result and derivatives are those of
        `MAML.forward`."""
        return super().forward(*args, **kwargs) if len(self.extra) else MAML.forward(self, *args, **kwargs)

    def explain(self, *args: Any, **kwargs: Any) -> Explanation:
        """As `MAML.explain`."""
        return super().explain(*args, **kwargs) if len(self.extra) else MAML.explain(self, *args, **kwargs)


class _PerStepNorms(StepwiseMachinery):
    """`StepwiseMachinery` with norms of their own for every step.

    Args:
        module: as of `Machinery`.
        asked: what `adapt` says before norms are left out of it.
        norms: their weights and biases, name -> key in `extra`.
    """

    def __init__(self, module: Any, asked: str | tuple[str, ...], norms: dict[str, str]) -> None:
        super().__init__(module)
        self.asked, self.norms = asked, norms

    @property
    def names(self) -> tuple[str, ...]:
        """As `Machinery.names`, without the norms."""
        if not self.norms:
            return super().names
        return tuple(name for name in adapted_names(self.who, self.net, self.asked) if name not in self.norms)

    def options(self, who: str, support_per_step: bool = False) -> Options:
        options = super().options(who, support_per_step)
        return options._replace(adapt=self.names) if self.norms and self.asked in BY_GRAD else options

    def lr_of(self, rates: dict[str, Tensor], tasks: Tensor | None = None) -> Rates:
        lr = super().lr_of(rates, tasks)
        if not self.norms or not isinstance(lr, Mapping):
            return lr
        names = self.names  # to the operators these are named ones, which have rates for themselves alone
        return {name: rate for name, rate in lr.items() if name in names}

    def path(
        self, options: Options, support: Tensors, steps: int, per_step: bool, tasks: Tensor | None = None
    ) -> Iterator[dict[str, Tensor]]:
        """As `StepwiseMachinery.path`; norms of theta_k, k > 0, are those of step k."""
        params, rates = self.differentiable()
        lr, hyper = self.lr_of(rates, tasks), self.hyper_of(rates)
        theta = {**params}
        yield theta
        chain = RuleChain(options, self.net, self.names, self.loss, self.aliases())
        for k in range(steps):
            if k:
                later = {name: rates[f"extra.{key}"] for name, key in self.norms.items()}  # [K - 1, *shape]
                theta = {**theta, **{name: rows[min(k, len(rows)) - 1] for name, rows in later.items()}}
            tensors, rate = support_of(support, k, per_step), at_step(lr, k)
            numbers = hyper_at(options.rule, hyper, k)
            if options.rule.has_state:
                moved = chain.step(theta, tensors, rate, numbers)
            else:
                given = options, self.net, theta, tensors, rate, self.loss, self.aliases()
                moved = inner_loop(*given, hyper=numbers)
            theta = {**theta, **{name: moved[name] for name in self.names}}
            yield theta

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "asked": self.asked, "norms": self.norms}


def step_weights(steps: int, epoch: int, epochs: int) -> tuple[float, ...]:
    """The annealed weights of the query losses after 0 .. K steps, which sum to 1.

    From 1 / K each the first K - 1 fall linearly, to zero in `epochs` epochs but never below 0.03 /
    K; the last one takes what they lose.

    Args:
        steps: K, at least 1.
        epoch: this one, from 0.
        epochs: of the annealing.

    Source: the authors' code of MAML++,
    https://github.com/AntreasAntoniou/HowToTrainYourMAMLPytorch,
    `get_per_step_loss_importance_vector`.
    """
    early = max((1 - epoch / epochs) / steps, 0.03 / steps)
    return (0.0, *[early] * (steps - 1), 1 - (steps - 1) * early)


def _norm_parameters(net: nn.Module) -> dict[str, Tensor]:
    """The weights and biases of norms by name."""
    own = {
        id(value)
        for module in net.modules()
        if isinstance(module, _NORMS)
        for value in module.parameters(False)
    }
    return {name: value for name, value in net.named_parameters() if id(value) in own}
