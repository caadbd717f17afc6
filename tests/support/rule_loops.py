"""Inner loops with the update rules of `torch.optim`, and Lion's, written out in plain PyTorch, for
autograd through all of it; it shares no code with the library."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from math import nan
from typing import Any

import torch
from tensors import drawn
from torch import Tensor, nn
from torch.func import functional_call

import fastmeta as fm

Named = dict[str, Tensor]
Numbers = dict[str, Any]
MSE = nn.functional.mse_loss


@dataclass(frozen=True)
class RuleCase:
    """A rule by its name in fastmeta, with numbers as an argument of it, or "beta1" and "beta2"."""

    label: str
    rule: str
    numbers: dict[str, float] = field(default_factory=dict)
    flags: dict[str, bool] = field(default_factory=dict)
    lr: float = 0.05

    def make(self, numbers: Numbers | None = None) -> fm.SGD:
        """The rule, of these numbers in the place of its own."""
        numbers = {**(self.numbers if numbers is None else numbers)}
        if "beta1" in numbers:
            numbers["betas"] = numbers.pop("beta1"), numbers.pop("beta2")
        return getattr(fm, self.rule)(**numbers, **self.flags)

    def tensors(self, steps: int | None = None) -> Named:
        """Its numbers as leaves, () or of every step its own."""
        if steps is None:
            return {n: torch.tensor(v, dtype=torch.float64) for n, v in self.numbers.items()}
        near = 1 - 0.02 * torch.linspace(0, 1, steps, dtype=torch.float64)
        return {n: v * near for n, v in self.numbers.items()}


_BETAS = {"beta1": 0.9, "beta2": 0.99}
CASES = [
    RuleCase("sgd", "SGD", {"momentum": 0.9, "weight_decay": 0.1}),
    RuleCase("sgd_dampening", "SGD", {"momentum": 0.8, "dampening": 0.3, "weight_decay": 0.1}),
    RuleCase("sgd_nesterov", "SGD", {"momentum": 0.8, "weight_decay": 0.1}, {"nesterov": True}),
    RuleCase("sgd_clip_norm", "SGD", {"momentum": 0.5, "clip_norm": 0.7}),
    RuleCase("sgd_clip_value", "SGD", {"weight_decay": 0.1, "clip_value": 0.2}),
    RuleCase("adam", "Adam", {**_BETAS, "eps": 1e-3}, lr=0.02),
    RuleCase("adam_root", "Adam", {**_BETAS, "eps": 1e-8, "eps_root": 1e-4, "weight_decay": 0.1}, lr=0.02),
    RuleCase("adamw", "AdamW", {**_BETAS, "eps": 1e-3, "weight_decay": 0.3, "clip_norm": 0.5}, lr=0.02),
    RuleCase("rmsprop", "RMSProp", {"alpha": 0.9, "eps": 1e-3, "weight_decay": 0.1}, lr=0.02),
    RuleCase(
        "rmsprop_centered",
        "RMSProp",
        {"alpha": 0.9, "eps": 1e-2, "eps_root": 1e-4, "momentum": 0.5},
        {"centered": True},
        lr=0.01,
    ),
    RuleCase("adagrad", "Adagrad", {"lr_decay": 0.1, "weight_decay": 0.1, "eps": 1e-3}),
    RuleCase("adagrad_start", "Adagrad", {"eps": 1e-10, "eps_root": 1e-4}),
    RuleCase("lion", "Lion", {"beta1": 0.9, "beta2": 0.99, "weight_decay": 0.3}, lr=0.01),
]


def problem(
    steps: int | None = None, tasks: int = 2, dead: bool = False
) -> tuple[nn.Module, Named, list[Tensor]]:
    """(a network, its parameters, support_x, support_y, query_x, query_y); with `steps` a support
    set for each; `dead`: with ReLU, one of whose units is never on."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        hidden = nn.ReLU() if dead else nn.Tanh()
        net = nn.Sequential(nn.Linear(2, 5), hidden, nn.Linear(5, 2)).double()
    if dead:
        with torch.no_grad():
            net[0].bias[1] = -100.0
    lead = (tasks, 4) if steps is None else (tasks, steps, 4)
    data = drawn((*lead, 2), (*lead, 2), (tasks, 3, 2), (tasks, 3, 2), seed=5, dtype=torch.float64)
    return net, {name: value.detach().clone() for name, value in net.named_parameters()}, data


def clipped(g: Named, now: Numbers) -> Named:
    """As `torch.nn.utils.clip_grad_value_` and `clip_grad_norm_`."""
    if "clip_value" in now:
        g = {n: torch.clamp(v, -now["clip_value"], now["clip_value"]) for n, v in g.items()}
    if "clip_norm" in now:
        total = torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(v) for v in g.values()]))
        scale = torch.clamp(now["clip_norm"] / (total + 1e-6), max=1.0)
        g = {n: v * scale for n, v in g.items()}
    return g


def updated(
    case: RuleCase, p: Tensor, g: Tensor, buffers: dict[str, Tensor], lr: Tensor, now: Numbers, k: int
) -> Tensor:
    """One parameter after a step, line by line as `torch.optim`'s `_single_tensor_` functions have
    it; `buffers` are changed."""
    decay = now.get("weight_decay")
    if decay is not None and case.rule not in ("AdamW", "Lion"):
        g = g.add(p * decay)
    if case.rule == "SGD":
        momentum = now.get("momentum")
        if momentum is not None:
            old = buffers.get("buf")
            buffers["buf"] = g if old is None else old * momentum + (1 - now.get("dampening", 0.0)) * g
            g = g + momentum * buffers["buf"] if case.flags.get("nesterov") else buffers["buf"]
        return p - lr * g
    zero = torch.zeros_like(p)
    if case.rule == "Lion":
        m = buffers.get("m", zero)
        buffers["m"] = m * now["beta2"] + g * (1 - now["beta2"])
        return p * (1 - lr * decay) - lr * torch.sign(m * now["beta1"] + g * (1 - now["beta1"]))
    root = now.get("eps_root")
    if case.rule == "Adagrad":
        buffers["sum"] = buffers.get("sum", zero) + g.square()
        std = (buffers["sum"] if root is None else buffers["sum"] + root).sqrt() + now["eps"]
        return p - lr / (1 + k * now.get("lr_decay", 0.0)) * (g / std)
    if case.rule == "RMSProp":
        alpha = now["alpha"]
        buffers["sq"] = buffers.get("sq", zero) * alpha + (1 - alpha) * g.square()
        sq = buffers["sq"]
        if case.flags.get("centered"):
            buffers["avg"] = torch.lerp(buffers.get("avg", zero), g, 1 - alpha)
            sq = sq - buffers["avg"].square()
        step = g / ((sq if root is None else sq + root).sqrt() + now["eps"])
        if "momentum" in now:
            buffers["buf"] = buffers.get("buf", zero) * now["momentum"] + step
            step = buffers["buf"]
        return p - lr * step
    if case.rule == "AdamW":
        p = p * (1 - lr * decay)
    b1, b2 = now["beta1"], now["beta2"]
    buffers["m"] = torch.lerp(buffers.get("m", zero), g, 1 - b1)
    buffers["v"] = buffers.get("v", zero) * b2 + (1 - b2) * g.square()
    correction1, correction2 = 1 - b1 ** (k + 1), 1 - b2 ** (k + 1)
    if root is None:
        denominator = buffers["v"].sqrt() / correction2**0.5 + now["eps"]
    else:  # as optax: inside the root, after the correction
        denominator = (buffers["v"] / correction2 + root).sqrt() + now["eps"]
    return p - (lr / correction1) * (buffers["m"] / denominator)


def loop(
    case: RuleCase,
    net: nn.Module,
    theta: Named,
    x: Tensor,
    y: Tensor,
    lr: Tensor,  # () or [K]
    numbers: Numbers,
    steps: int,
    per_step: bool = False,
    first_order: bool = False,
) -> tuple[list[Named], list[Tensor]]:
    """(theta_0 .. theta_K, support losses at theta_0 .. theta_{K-1}) of one task, with their
    graph."""
    path, losses = [dict(theta)], []
    buffers: dict[str, dict[str, Tensor]] = {name: {} for name in theta}
    for k in range(steps):
        now = {n: v[k] if isinstance(v, Tensor) and v.dim() else v for n, v in numbers.items()}
        now = {
            n: v if isinstance(v, Tensor) else torch.tensor(v, dtype=torch.float64) for n, v in now.items()
        }
        loss = MSE(functional_call(net, path[-1], (x[k] if per_step else x,)), y[k] if per_step else y)
        values = list(path[-1].values())
        found = torch.autograd.grad(loss, values, create_graph=not first_order, retain_graph=True)
        g = clipped(dict(zip(theta, found, strict=True)), now)
        rate = lr[k] if lr.dim() else lr
        path.append({n: updated(case, path[-1][n], g[n], buffers[n], rate, now, k) for n in theta})
        losses.append(loss)
    return path, losses


def meta_gradient(
    case: RuleCase,
    net: nn.Module,
    params: Named,
    data: Sequence[Tensor],
    lr: Tensor,
    numbers: Named,
    steps: int,
    *,
    per_step: bool = False,
    first_order: bool = False,
    step_weights: Sequence[float] | None = None,
    support_weights: Sequence[float] | None = None,
    task_weights: Tensor | None = None,
) -> dict[str, Any]:
    """Task losses and every gradient: "params", "lr", "rule", "support_x", "query_x"."""
    theta = {n: v.clone().requires_grad_() for n, v in params.items()}
    lr = lr.clone().requires_grad_()
    own = {n: v.clone().requires_grad_() for n, v in numbers.items()}
    sx, sy, qx, qy = (x.clone().requires_grad_() for x in data)
    weights = step_weights or (*[0.0] * steps, 1.0)
    found = []
    for t in range(len(qx)):
        how = {"per_step": per_step, "first_order": first_order}
        path, losses = loop(case, net, theta, sx[t], sy[t], lr, own, steps, **how)
        total = sum(
            w * MSE(functional_call(net, p, (qx[t],)), qy[t]) for w, p in zip(weights, path, strict=True)
        )
        found.append(total + sum(w * value for w, value in zip(support_weights or [], losses, strict=False)))
    task_losses = torch.stack(found)
    loss = task_losses.mean() if task_weights is None else (task_losses * task_weights).sum() / len(qx)
    leaves = [*theta.values(), lr, *own.values(), sx, qx]
    grads = iter(torch.autograd.grad(loss, leaves, materialize_grads=True, allow_unused=True))
    return {
        "task_losses": task_losses.detach(),
        "params": {name: next(grads) for name in theta},
        "lr": next(grads),
        "rule": {name: next(grads) for name in own},
        "support_x": next(grads),
        "query_x": next(grads),
    }


def errors(got: fm.MetaGradient, want: dict[str, Any]) -> dict[str, float]:
    """Relative errors by what; infinite where one has a NaN that the other has not."""
    found = {"task_losses": _error([got.task_losses], [want["task_losses"]])}
    for name in ("lr", "support_x", "query_x"):
        found[name] = _error([getattr(got, name)], [want[name]])
    found["params"] = _error(got.grads.values(), want["params"].values())
    assert got.rule is not None
    assert got.rule.keys() == want["rule"].keys()
    return found | {f"rule.{n}": _error([got.rule[n]], [v]) for n, v in want["rule"].items()}


def _error(got: Any, want: Any) -> float:
    a, b = (torch.cat([x.reshape(-1) for x in group]) for group in (got, want))
    if a.shape != b.shape or not torch.equal(a.isnan(), b.isnan()):
        return nan
    a, b = a[~a.isnan()], b[~b.isnan()]
    return float((a - b).norm() / b.norm().clamp_min(1e-12))
