"""CAVIA: the inner loop adapts a few context parameters, the network itself is shared by all
tasks."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastmeta.algorithms.machinery import MAMLMachinery
from fastmeta.algorithms.maml import MAML
from fastmeta.models.check import positive
from fastmeta.network.swap import locked
from fastmeta.ops.options import argument
from fastmeta.ops.rates import Rates


class Context(nn.Module):
    """Context parameters phi, concatenated to every example: [N, I] -> [N, I + size].

    The linear layer behind it computes W [x, phi] + b = W_x x + W_phi phi + b.

    Args:
        size: the number of context parameters.

    Raises:
        TypeError, ValueError: `size` is no positive int.

    Source: Zintgraf, Shiarlis, Kurin, Hofmann, Whiteson, "Fast Context Adaptation via
        Meta-Learning" (2019), section 3.
    """

    def __init__(self, size: int) -> None:
        super().__init__()
        self.phi = nn.Parameter(torch.zeros(positive("Context", "size", size), 1), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        """[N, I] -> [N, I + size]."""
        # phi is the weight of a linear layer that reads a constant: a layer program has no other
        # place for it
        one = (0.0 * x).unsqueeze(1).mean(2) + 1.0  # [N, 1]
        return torch.cat((x, F.linear(one, self.phi)), 1)


class CAVIA(MAML):
    """Fast context adaptation: every task starts from context parameters of zero and adapts nothing
    else.

        net = nn.Sequential(fm.Context(5), nn.Linear(1 + 5, 40), nn.ReLU(), nn.Linear(40, 1))
        cavia = fm.CAVIA(net, loss="mse", inner_lr=1.0, inner_steps=1)
        cavia(support_x, support_y, query_x, query_y).loss.backward()

    It is `MAML` on those parameters, which are no meta-parameters: they get no gradient. The
    gradient of all others is exact, through the inner loop. A `Context` may stand before any linear
    layer; it runs on the `cpu` backend.

    Args:
        net: the network, with a `Context` in it.
        context: names of the context parameters, glob patterns of them or a predicate, as `adapt`
            of `fastmeta.MAML`;
            they must be zero and require no grad. None: those of all `Context` layers. Named ones
            may stand anywhere, such as in a layer of one's own that scales and shifts feature maps
            by linear functions of them (FiLM), which runs on the `torch` backend.
        loss, query_loss, inner_lr, inner_steps, order, learn_lr, lr_per_step, step_weights,
        weight_norm, update_rule,
            memory, task_chunk, batch_stats, backend, on_divergence: as in `fastmeta.MAML`.

    Raises:
        TypeError, ValueError: an argument does not fit; the message names it.

    Source: Zintgraf et al., "Fast Context Adaptation via Meta-Learning" (2019), section 3.
    """

    who = "CAVIA"

    @locked
    def __init__(
        self,
        net: nn.Module,
        *,
        loss: object,
        inner_lr: Rates,
        inner_steps: int,
        context: Iterable[str] | Callable[[str, nn.Parameter], bool] | None = None,
        **options: Any,
    ) -> None:
        if "adapt" in options:
            raise TypeError(
                "CAVIA: `adapt` is no argument, the context parameters are what it adapts; see `context`"
            )
        if isinstance(context, str):
            raise TypeError(
                f"{argument(self.who, 'adapt')} must be names of parameters or None, got {context!r}"
            )
        names = _names_of_layers(net) if context is None else context
        super().__init__(net, loss=loss, inner_lr=inner_lr, inner_steps=inner_steps, adapt=names, **options)
        params = dict(net.named_parameters())
        self.context = tuple(name for name in params if name in self.adapts)
        for name in self.context:
            if params[name].requires_grad or params[name].count_nonzero():
                raise ValueError(
                    f"{argument(self.who, 'adapt')}: {name!r} must be zero and require no grad, since every "
                    "task starts from zero: nn.Parameter(torch.zeros(...), requires_grad=False)"
                )
        self._machinery = _ContextMachinery(self)


class _ContextMachinery(MAMLMachinery):
    def bind(self, module: Any) -> None:
        super().bind(module)
        self.context: tuple[str, ...] = module.context

    def meta_parameters(self, check: bool = True) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """The context is zero whatever became of it, and requires no grad."""
        params, rates = super().meta_parameters(check)
        zeros = {name: torch.zeros_like(params[name], requires_grad=False) for name in self.context}
        return {**params, **zeros}, rates


def _names_of_layers(net: nn.Module) -> tuple[str, ...]:
    """The context parameters of all `Context` layers.

    Raises:
        TypeError, ValueError: no network, or one without such a layer.
    """
    if not isinstance(net, nn.Module):
        raise TypeError(f"{argument('CAVIA', 'net')} must be a torch.nn.Module, got {type(net).__name__}")
    own = {id(module.phi) for module in net.modules() if isinstance(module, Context)}
    if not own:
        raise ValueError(
            "CAVIA: `net` must have a fastmeta.Context layer, or `context` name its context parameters"
        )
    return tuple(name for name, value in net.named_parameters() if id(value) in own)
