"""Inner steps by an update rule with a state, where every step is a call of its own: the engine has
the gradient, and the rule runs in PyTorch, so that autograd links the states too."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from fastmeta.backends._rule_tasks import start_of_all, step_of_all
from fastmeta.ops.again import Aliases
from fastmeta.ops.checks import Tensors
from fastmeta.ops.options import Options
from fastmeta.ops.rates import Rates
from fastmeta.ops.rule_numbers import Hyper
from fastmeta.ops.task_gradient import gradient
from fastmeta.problem import Problem
from fastmeta.update_rules import SGD
from fastmeta.update_rules.rule import State


class RuleChain:
    """The steps of one inner loop, in their order.

    Args:
        options: of one inner step, with the rule.
        net: the network.
        names: the adapted parameters.
        loss: the support loss.
        aliases: as of `gradient`.
    """

    def __init__(
        self, options: Options, net: nn.Module, names: tuple[str, ...], loss: object, aliases: Aliases | None
    ) -> None:
        self.net, self.names, self.loss, self.aliases = net, names, loss, aliases
        self.rule, self.first_order = options.rule, options.order == "first"
        self._options = options._replace(rule=SGD())
        self._state: State | None = None
        self._step = 0

    def step(
        self, params: Mapping[str, Tensor], support: Tensors, lr: Rates, hyper: Hyper
    ) -> dict[str, Tensor]:
        """The adapted parameters after the next step, [T, *shape] each.

        Args:
            params: every parameter, [*shape] or [T, *shape].
            support: the support sets of this step.
            lr, hyper: of this step, as `at_step` and `hyper_at` say.

        Derivatives: exact, through the state too; first order leaves out those of the gradients.
        """
        found = gradient(self._options, self.net, params, support, self.loss, self.aliases)
        g = {name: found[name].detach() if self.first_order else found[name] for name in self.names}
        tasks = len(next(iter(g.values())))
        theta = {name: params[name].expand_as(by) for name, by in g.items()}  # [*shape] or [T, *shape]
        rates = {name: _rate(lr[name] if isinstance(lr, Mapping) else lr, theta[name]) for name in theta}
        if self._state is None:
            self._state = start_of_all(self.rule, theta)
        problem = Problem(net=self.net, params=theta, per_task=frozenset(theta), tasks=tasks, steps=1)
        moved, self._state = step_of_all(problem, self.rule, theta, g, self._state, rates, hyper, self._step)
        self._step += 1
        return moved


def _rate(rate: object, value: Tensor) -> Tensor:
    """[T or 1, *(S or 1s)], of a number, () or [1, T or 1, *(S or 1s)]; value is [T, *shape]."""
    if isinstance(rate, Tensor) and rate.dim():
        return rate[0]
    return torch.as_tensor(rate, dtype=value.dtype, device=value.device).reshape(1, *[1] * (value.dim() - 1))
