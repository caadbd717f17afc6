"""The meta-objective as a loop over tasks in plain PyTorch, which calls the module itself with
tensors assigned to it.

It shares nothing with the library: no functional_call, no loss of fastmeta's, no update rule of
fastmeta's.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel


def batch_norms(net: nn.Module) -> list[nn.Module]:
    """All of a network."""
    return [module for module in net.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]


def uses_batch(norm: nn.Module, batch_stats: str) -> bool:
    """Whether a batch norm uses the batch's own statistics, and not its running ones."""
    return batch_stats == "task" or (batch_stats == "module" and norm.training)


class Shell:
    """A copy of a module that is called with given tensors in the places of its parameters.

    Args:
        net: the module.
        batch_stats: as in `fastmeta.meta_gradient`.
    """

    def __init__(self, net: nn.Module, batch_stats: str) -> None:
        self.net = copy.deepcopy(net)
        self.places: dict[str, list[tuple[nn.Module, str]]] = {}
        names = {id(value): name for name, value in self.net.named_parameters()}
        for module in self.net.modules():
            for key, value in [*module._parameters.items()]:
                if value is not None:
                    self.places.setdefault(names[id(value)], []).append((module, key))
        for module in self.net.modules():
            for key in [key for key, value in module._parameters.items() if value is not None]:
                del module._parameters[key]
        for norm in batch_norms(self.net):
            norm.train(uses_batch(norm, batch_stats))
            if norm.training:
                norm.running_mean = norm.running_var = None

    def __call__(self, theta: Mapping[str, Tensor], x: Tensor) -> Tensor:
        for name, places in self.places.items():
            for module, key in places:
                module.__dict__[key] = theta[name]
        for module in self.net.modules():
            if isinstance(module, nn.RNNBase):
                module.__dict__["_flat_weights"] = [
                    module.__dict__[key] for key in module._flat_weights_names
                ]
        with sdpa_kernel(SDPBackend.MATH):  # the fused kernels have no second derivative
            return self.net(x)


@dataclass
class PlainLoss:
    """A loss written down once more.

    Args:
        kind: as fastmeta names it, or "custom".
        options: of the function of torch.nn.functional.
        mean: reduction "mean", else "sum".
        weight_norm: "count" or "sum".
    """

    kind: str
    options: dict[str, Any] = field(default_factory=dict)
    mean: bool = True
    weight_norm: str = "count"

    def __call__(self, output: Tensor, y: Tensor, w: Tensor | None) -> Tensor:
        """The loss of one task: output [N, *out], y, w [N]."""
        if self.kind == "custom":
            return custom(output, y)
        functions: dict[str, Callable[..., Tensor]] = {
            "mse": F.mse_loss,
            "l1": F.l1_loss,
            "smooth_l1": F.smooth_l1_loss,
            "huber": F.huber_loss,
            "cross_entropy": F.cross_entropy,
            "bce_with_logits": F.binary_cross_entropy_with_logits,
        }
        options = {
            key: value.to(output) if isinstance(value, Tensor) else value
            for key, value in self.options.items()
        }
        values = functions[self.kind](output, y, reduction="none", **options)  # [N, ...]
        share = torch.ones_like(values)
        if self.kind == "cross_entropy" and not y.is_floating_point():
            ignored = y == options.get("ignore_index", -100)
            weight = options.get("weight")
            share = share if weight is None else weight[y.masked_fill(ignored, 0)]
            share = share.masked_fill(ignored, 0)
        if w is not None:
            w = w.reshape(-1, *[1] * (values.dim() - 1))
            values = values * w
            if self.weight_norm == "sum":
                share = share * w
        return values.sum() / share.sum() if self.mean else values.sum()


def custom(output: Tensor, y: Tensor) -> Tensor:
    """A loss that has no name."""
    return (output - y).pow(4).mean() + 0.1 * output.tanh().mean()


@dataclass
class Meta:
    """All that a meta-objective is made of; shapes as in `fastmeta.meta_gradient`."""

    net: nn.Module
    params: dict[str, Tensor]  # [*shape] or [T, *shape]
    per_task: frozenset[str]
    support: tuple[Tensor, Tensor, Tensor | None] | None  # x, y, weights
    query: tuple[Tensor, Tensor, Tensor | None] | None
    loss: PlainLoss
    query_loss: PlainLoss
    rates: dict[str, Tensor]  # adapted name -> broadcasts to [K, T, *shape]
    tasks: int
    steps: int
    momentum: float = 0.0
    weight_decay: float = 0.0
    rule: Any = None  # a PlainRule; None: SGD with momentum and weight decay
    second: bool = True
    per_step: bool = False
    step_weights: tuple[float, ...] | None = None
    support_step_weights: tuple[float, ...] | None = None
    task_weights: Tensor | None = None
    batch_stats: str = "task"


@dataclass
class Answer:
    """Losses [T], output [T, M, ...] and adapted parameters, with their graphs."""

    task_losses: Tensor | None
    output: Tensor | None
    adapted: dict[str, Tensor]

    def mean(self, task_weights: Tensor | None) -> Tensor:
        """The meta-loss."""
        losses = self.task_losses
        return losses.mean() if task_weights is None else (task_weights * losses).sum() / len(losses)


def solve(meta: Meta) -> Answer:
    """The answer, by a loop."""
    shell = Shell(meta.net, meta.batch_stats)
    rows = [_one_task(shell, meta, t) for t in range(meta.tasks)]
    losses, outputs, thetas = zip(*rows, strict=True)
    return Answer(
        torch.stack(losses) if losses[0] is not None else None,
        torch.stack(outputs) if outputs[0] is not None else None,
        {name: torch.stack([theta[name] for theta in thetas]) for name in meta.params},
    )


def _one_task(shell: Shell, meta: Meta, t: int) -> tuple[Tensor | None, Tensor | None, dict[str, Tensor]]:
    # contiguous: PyTorch's batch norm reads a weight with a stride wrongly
    theta = {n: (value[t] if n in meta.per_task else value).contiguous() for n, value in meta.params.items()}
    buffers = {name: torch.zeros_like(theta[name]) for name in meta.rates}
    weights = meta.step_weights or (*[0.0] * meta.steps, 1.0)
    state = None if meta.rule is None else meta.rule.init({name: theta[name] for name in meta.rates})
    total, output = None, None
    for k in range(meta.steps + 1):
        if meta.query is not None and (weights[k] or k == meta.steps):
            x, y, w = [None if part is None else part[t] for part in meta.query]
            output = shell(theta, x.clone())
            if y is not None:
                value = weights[k] * meta.query_loss(output, y, w)
                total = value if total is None else total + value
        if k == meta.steps:
            break
        x, y, w = [None if part is None else part[t] for part in meta.support]
        if meta.per_step:
            x, y, w = [None if part is None else part[k] for part in (x, y, w)]
        loss = meta.loss(shell(theta, x.clone()), y, w)
        if meta.support_step_weights and meta.support_step_weights[k]:
            value = meta.support_step_weights[k] * loss
            total = value if total is None else total + value
        names = list(meta.rates)
        with torch.enable_grad():
            grads = torch.autograd.grad(
                loss,
                [theta[name] for name in names],
                create_graph=meta.second,
                retain_graph=True,
                allow_unused=True,
            )
        if meta.rule is not None:
            known = zip(names, grads, strict=True)
            g = {name: torch.zeros_like(theta[name]) if by is None else by for name, by in known}
            now = {name: _rate(meta, name, theta[name], k, t) for name in names}
            moved, state = meta.rule.move({name: theta[name] for name in names}, g, state, now, k)
            theta |= moved
            continue
        for name, g in zip(names, grads, strict=True):
            g = torch.zeros_like(theta[name]) if g is None else g
            if meta.weight_decay:
                g = g + meta.weight_decay * theta[name]
            if meta.momentum:
                g = g + meta.momentum * buffers[name]
            buffers[name] = g
            theta[name] = theta[name] - _rate(meta, name, g, k, t) * g
    return total, output, theta


def _rate(meta: Meta, name: str, like: Tensor, k: int, t: int) -> Tensor:
    """Of all elements of one parameter, at one step of one task."""
    return meta.rates[name].expand(max(meta.steps, 1), meta.tasks, *like.shape)[k, t].to(like.dtype)
