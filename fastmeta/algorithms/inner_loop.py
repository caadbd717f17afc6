"""What algorithms that do not differentiate through their inner loop have in common: its options
and adapt."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from fastmeta.algorithms.algorithm import Algorithm, Machinery
from fastmeta.algorithms.inner_rates import InnerRates
from fastmeta.inputs import Tree
from fastmeta.losses import resolve
from fastmeta.network.swap import locked
from fastmeta.ops.adapted import adapted_now
from fastmeta.ops.checks import Tensors, check_net, leaves_named
from fastmeta.ops.eager import eager
from fastmeta.ops.inner_sgd import inner_loop
from fastmeta.ops.options import Adapt, Options, check_options, names_of, rule_of
from fastmeta.ops.plan import prepare
from fastmeta.ops.rates import Rates, repeated
from fastmeta.ops.rule_numbers import repeated_hyper
from fastmeta.update_rules import UpdateRule

if TYPE_CHECKING:
    from fastmeta.explain import Explanation


class InnerLoop(Algorithm):
    """A network, a loss and K inner steps; a base class, whose subclasses add `forward`.

    Args:
        net, loss, inner_lr, inner_steps, adapt, weight_norm, update_rule, batch_stats, backend: as
            in `fastmeta.MAML`.

    Raises:
        TypeError, ValueError: an argument does not fit; the message names it.
    """

    _machinery: InnerLoopMachinery

    @locked
    def __init__(
        self,
        net: nn.Module,
        *,
        loss: object,
        inner_lr: Rates,
        inner_steps: int,
        adapt: Adapt,
        weight_norm: str,
        update_rule: UpdateRule | None,
        batch_stats: str,
        backend: str,
    ) -> None:
        super().__init__()
        check_net(self.who, net)
        self.net = net
        self.loss = resolve(loss, weight_norm=weight_norm)
        self.inner_steps = inner_steps
        self.adapts = names_of(self.who, net, adapt)
        self.update_rule = rule_of(self.who, update_rule)
        self.batch_stats = batch_stats
        self.backend = backend
        check_options(options_of(self, self.who))
        params: dict[str, Tensor] = dict(net.named_parameters())
        now = adapted_now(self.who, net, self.adapts)
        self.inner_lrs = InnerRates(
            self.who, inner_lr, steps=inner_steps, names=now.names, params=params, frozen=now.frozen
        )
        self._machinery = InnerLoopMachinery(self)

    @eager
    def adapt(
        self, x: Tree, y: Tree, steps: int | None = None, weights: Tensor | None = None
    ) -> dict[str, Tensor]:
        """The parameters of every task after the inner loop.

        Args:
            x: support inputs [T, N, *in], or a tree of tensors, see `fastmeta.Inputs`.
            y: support targets.
            steps: None: `inner_steps`. Beyond those the last step's learning rates repeat.
            weights: of the support examples, [T, N]; of booleans: a mask.

        Returns:
            name -> [T, *shape], every parameter, also those that are not adapted; detached.
        """
        steps = self.inner_steps if steps is None else steps
        return self._machinery.adapted(f"{self.who}.adapt", Tensors(x, y, weights), steps)

    def explain(self, x: Tree, y: Tree, weights: Tensor | None = None) -> Explanation:
        """Which backend runs the inner loop on these support sets, at what cost, and why others do
        not; print it.

        Args:
            x, y, weights: as in `adapt`.
        """
        from fastmeta.explain import explain

        own = self._machinery
        options = own.options(f"{self.who}.adapt")._replace(order="first")
        params, lr = own.params(), self.inner_lrs.as_given({})
        given = options, self.net, params, Tensors(x, y, weights), self.loss, None, lr
        return explain(prepare(*given, hyper=own.hyper))


class InnerLoopMachinery(Machinery):
    """The inner loop of such an algorithm."""

    def options(self, who: str) -> Options:
        """The options as they are now; `who` is for messages."""
        return options_of(self.module, who)

    def params(self) -> dict[str, Tensor]:
        """The meta-parameters by name."""
        return dict(self.net.named_parameters())

    def adapted(
        self, who: str, tensors: Tensors, steps: int, support_per_step: bool = False
    ) -> dict[str, Tensor]:  # name -> [T, *shape], detached
        """The inner loop on the support sets in `tensors`; `who` is for messages."""
        options = self.options(who)._replace(steps=steps, support_per_step=support_per_step)
        check_options(options)
        lr = repeated(self.inner_lrs.as_given({}), steps)
        hyper = repeated_hyper(options.rule, self.hyper, steps)
        with torch.no_grad():
            return inner_loop(options, self.net, self.params(), tensors, lr, self.loss, hyper=hyper)


def options_of(module: Any, who: str) -> Options:
    """The options of an `InnerLoop` as they are now; `who` is for messages."""
    return Options(
        who,
        module.inner_steps,
        adapt=module.adapts,
        rule=module.update_rule.form,
        batch_stats=module.batch_stats,
        backend=module.backend,
    )


def check_no_gradients(who: str, tensors: Tensors) -> None:
    """Refuse inputs that would be left without their gradient.

    Raises:
        ValueError: an input requires grad.
    """
    for field, tree in tensors._asdict().items():
        for name, tensor in leaves_named(who, field, tree):
            if tensor.requires_grad:
                raise ValueError(f"{name} must not require grad: {who} has no gradients of its inputs")
