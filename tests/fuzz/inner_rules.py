"""Update rules of the inner loop: formulas of their own, and what fastmeta calls them.

The formulas are those of `torch.optim` and of the papers, written down once more; they share
nothing with the library.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from drawing import Spec
from torch import Tensor, nn

import fastmeta as fm

Named = dict[str, Tensor]


@dataclass
class PlainRule:
    """A rule as `init` and `step` of one task.

    Args:
        init: theta -> state.
        step: (theta, gradient, state, rates, k, numbers) -> (theta', state').
        numbers: of the rule, by name: plain ones, or learned ones, () or [K].
        module: of a rule of the user's own.
    """

    init: Callable[[Named], Any]
    step: Callable[[Named, Named, Any, Named, int, dict[str, Any]], tuple[Named, Any]]
    numbers: dict[str, Any] = field(default_factory=dict)
    module: nn.Module | None = None

    def move(self, theta: Named, g: Named, state: Any, rates: Named, k: int) -> tuple[Named, Any]:
        """(theta', state') of step k."""
        now = {n: v[k] if isinstance(v, Tensor) and v.dim() else v for n, v in self.numbers.items()}
        return self.step(theta, _clipped(g, now), state, rates, k, now)

    def learned(self) -> Named:
        """Everything that gets a gradient, by name."""
        if self.module is not None:
            return {n: v for n, v in self.module.named_parameters() if v.requires_grad}
        return {name: value for name, value in self.numbers.items() if isinstance(value, Tensor)}


def _clipped(g: Named, numbers: dict[str, Any]) -> Named:
    if numbers.get("clip_value") is not None:
        c = torch.as_tensor(numbers["clip_value"], dtype=next(iter(g.values())).dtype)
        g = {n: torch.maximum(torch.minimum(v, c), -c) for n, v in g.items()}
    if numbers.get("clip_norm") is not None:
        total = torch.cat([v.flatten() for v in g.values()]).norm()
        share = numbers["clip_norm"] / (total + 1e-6)
        g = {n: v * share if bool(share < 1) else v for n, v in g.items()}
    return g


def _zeros(theta: Named) -> Named:
    return {n: torch.zeros_like(v) for n, v in theta.items()}


def _sgd(nesterov: bool) -> Any:
    def step(theta: Named, g: Named, state: Named, rates: Named, k: int, q: Any) -> tuple[Named, Named]:
        d = {n: g[n] + q["weight_decay"] * v for n, v in theta.items()}
        m = {n: q["momentum"] * state[n] + (1 - q["dampening"]) * v for n, v in d.items()} if k else d
        used = {n: d[n] + q["momentum"] * m[n] for n in d} if nesterov else m
        return {n: v - rates[n] * used[n] for n, v in theta.items()}, m

    return step


def _adam(apart: bool) -> Any:
    def step(theta: Named, g: Named, state: Any, rates: Named, k: int, q: Any) -> tuple[Named, Any]:
        b1, b2 = q["beta1"], q["beta2"]
        moved, m, v = {}, {}, {}
        for n, old in theta.items():
            d = g[n] if apart else g[n] + q["weight_decay"] * old
            m[n] = state[0][n] * b1 + d * (1 - b1)
            v[n] = state[1][n] * b2 + d**2 * (1 - b2)
            first, second = m[n] / (1 - b1 ** (k + 1)), v[n] / (1 - b2 ** (k + 1))
            root = (second + q["eps_root"]) ** 0.5
            start = old - rates[n] * q["weight_decay"] * old if apart else old
            moved[n] = start - rates[n] * first / (root + q["eps"])
        return moved, (m, v)

    return step


def _rmsprop(centered: bool) -> Any:
    def step(theta: Named, g: Named, state: Any, rates: Named, k: int, q: Any) -> tuple[Named, Any]:
        a, after, moved = q["alpha"], ({}, {}, {}), {}
        for n, old in theta.items():
            d = g[n] + q["weight_decay"] * old
            square, mean = a * state[0][n] + (1 - a) * d**2, a * state[1][n] + (1 - a) * d
            variance = square - mean**2 if centered else square
            buffer = q["momentum"] * state[2][n] + d / ((variance + q["eps_root"]) ** 0.5 + q["eps"])
            after[0][n], after[1][n], after[2][n] = square, mean, buffer
            moved[n] = old - rates[n] * buffer
        return moved, after

    return step


def _adagrad(theta: Named, g: Named, state: Named, rates: Named, k: int, q: Any) -> tuple[Named, Named]:
    after, moved = {}, {}
    for n, old in theta.items():
        d = g[n] + q["weight_decay"] * old
        after[n] = state[n] + d**2
        rate = rates[n] / (1 + k * q["lr_decay"])
        moved[n] = old - rate * d / ((after[n] + q["eps_root"]) ** 0.5 + q["eps"])
    return moved, after


def _lion(theta: Named, g: Named, state: Named, rates: Named, k: int, q: Any) -> tuple[Named, Named]:
    b1, b2 = q["beta1"], q["beta2"]
    moved = {
        n: v - rates[n] * (torch.sign(b1 * state[n] + (1 - b1) * g[n]) + q["weight_decay"] * v)
        for n, v in theta.items()
    }
    return moved, {n: b2 * state[n] + (1 - b2) * g[n] for n in theta}


class Momentum(nn.Module):
    """A learned momentum from a state that depends on theta, with a count beside it."""

    def __init__(self) -> None:
        super().__init__()
        self.size, self.mu = nn.Parameter(torch.tensor(0.9)), nn.Parameter(torch.tensor(0.6))

    def init(self, theta: Named) -> Any:
        count = torch.zeros((), dtype=torch.int64)
        return [{n: 0.3 * v.tanh() for n, v in theta.items()}, count]

    def forward(self, theta: Named, gradient: Named, state: Any) -> tuple[Named, Any]:
        kept = {n: self.mu * state[0][n] + gradient[n] for n in theta}
        size = self.size / (1 + state[1])
        return {n: theta[n] - size * kept[n].tanh() for n in theta}, [kept, state[1] + 1]


class Coordinates(nn.Module):
    """A small network on every coordinate, and what all coordinates have in common."""

    def __init__(self) -> None:
        super().__init__()
        self.cell, self.out = nn.GRUCell(2, 2), nn.Linear(2, 1)
        self.unused = nn.Parameter(torch.zeros(2))

    def init(self, theta: Named) -> Any:
        return {n: v.new_zeros(v.numel(), 2) for n, v in theta.items()}, next(iter(theta.values())).sum()

    def forward(self, theta: Named, gradient: Named, state: Any) -> tuple[Named, Any]:
        hidden, level = state
        inputs = {n: torch.stack([gradient[n].flatten(), v.flatten()], 1) for n, v in theta.items()}
        hidden = {n: self.cell(inputs[n], hidden[n]) for n in theta}
        size = sum(g.square().sum() for g in gradient.values())
        level = 0.5 * level + size / (1 + size)
        step = {n: self.out(hidden[n]).reshape(v.shape) * (1 + 0.1 * level) for n, v in theta.items()}
        return {n: v - 0.5 * step[n] for n, v in theta.items()}, (hidden, level)


def signed(theta: Named, gradient: Named, state: tuple[()]) -> tuple[Named, tuple[()]]:
    """A function with nothing of its own."""
    return {n: v - gradient[n] * (1 + gradient[n].tanh()) for n, v in theta.items()}, state


def _own(function: Any) -> Any:
    def step(theta: Named, g: Named, state: Any, rates: Named, k: int, q: Any) -> tuple[Named, Any]:
        moved, after = function(dict(theta), dict(g), state)
        return {n: v + rates[n] * (moved[n] - v) for n, v in theta.items()}, after

    return step


#: Rules of the user's own.
OWN: dict[str, Any] = {"momentum": Momentum, "coordinates": Coordinates, "signed": lambda: signed}


def _function(spec: Spec, dtype: torch.dtype) -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(spec.seed)
        made = OWN[spec.rule]()
    if not isinstance(made, nn.Module):
        return made
    made = made.double()
    for value in made.parameters():
        value.requires_grad_(bool(spec.learned))
    return made.to(dtype)


def _numbers(spec: Spec, dtype: torch.dtype) -> dict[str, Any]:
    """The numbers of a rule with a name; drawn by the seed."""
    g = torch.Generator().manual_seed(spec.seed + 1)

    def within(least: float, most: float, steps: int = 0) -> Any:
        shape = (steps,) if steps else ()
        return least + (most - least) * torch.rand(shape, generator=g, dtype=torch.float64)

    root = 0.0 if spec.rule_root == 0 else 0.05
    ranges = {
        "weight_decay": (0.01, 0.2),
        "momentum": (0.3, 0.9),
        "dampening": (0.1, 0.5),
        "beta1": (0.4, 0.9),
        "beta2": (0.6, 0.99),
        "alpha": (0.6, 0.99),
        "eps": (0.05, 0.2),
        "lr_decay": (0.1, 0.5),
        "eps_root": (root, 2 * root),
    }
    has = {
        "sgd": ("momentum", "weight_decay", "dampening"),
        "adam": ("beta1", "beta2", "eps", "eps_root", "weight_decay"),
        "adamw": ("beta1", "beta2", "eps", "eps_root", "weight_decay"),
        "rmsprop": ("alpha", "eps", "eps_root", "weight_decay", "momentum"),
        "adagrad": ("lr_decay", "weight_decay", "eps", "eps_root"),
        "lion": ("beta1", "beta2", "weight_decay"),
    }[spec.rule]
    numbers: dict[str, Any] = {}
    for at, name in enumerate(has):
        off = name in ("weight_decay", "dampening", "lr_decay") and not spec.seed >> at & 1
        off = off or (name == "dampening" and spec.rule_flag) or (name == "eps_root" and not root)
        numbers[name] = 0.0 if off else within(*ranges[name], spec.steps if spec.learned == "step" else 0)
    if "value" in spec.clip:
        numbers["clip_value"] = within(0.02, 0.5, spec.steps if spec.learned == "step" else 0)
    if "norm" in spec.clip:
        numbers["clip_norm"] = within(0.1, 2.0)
    for at, (name, value) in enumerate(numbers.items()):
        if isinstance(value, Tensor):
            learns = spec.learned and (spec.learned == "all" or at % 2 == 0 or value.dim())
            numbers[name] = value.to(dtype) if learns else float(value)
    return numbers


def plain_rule(spec: Spec, dtype: torch.dtype) -> PlainRule | None:
    """The formulas; None: those of SGD with `momentum` and `weight_decay` of the spec."""
    if not spec.rule:
        return None
    if spec.rule in OWN:
        function = _function(spec, dtype)
        module = function if isinstance(function, nn.Module) else None
        return PlainRule(getattr(function, "init", lambda theta: ()), _own(function), {}, module)
    numbers = _numbers(spec, dtype)
    made = {n: v.requires_grad_() if isinstance(v, Tensor) else v for n, v in numbers.items()}
    start = 0.1 if spec.rule_flag else 0.0
    two = lambda theta: (_zeros(theta), _zeros(theta))  # noqa: E731
    init, step = {
        "sgd": (_zeros, _sgd(spec.rule_flag)),
        "adam": (two, _adam(False)),
        "adamw": (two, _adam(True)),
        "rmsprop": (lambda theta: (*two(theta), _zeros(theta)), _rmsprop(spec.rule_flag)),
        "adagrad": (lambda t: {n: torch.full_like(v, start) for n, v in t.items()}, _adagrad),
        "lion": (_zeros, _lion),
    }[spec.rule]
    return PlainRule(init, step, made)


def library_rule(spec: Spec, dtype: torch.dtype) -> tuple[fm.UpdateRule, Named]:
    """The rule of fastmeta, and everything of it that gets a gradient, by name: leaves."""
    if not spec.rule:
        return fm.SGD(spec.momentum, spec.weight_decay), {}
    if spec.rule in OWN:
        function = _function(spec, dtype)
        every = getattr(function, "named_parameters", dict)()
        return fm.CustomRule(function), {
            name: value for name, value in dict(every).items() if value.requires_grad
        }
    q = _numbers(spec, dtype)
    q = {n: v.clone().requires_grad_() if isinstance(v, Tensor) else v for n, v in q.items()}
    learned = {n: v for n, v in q.items() if isinstance(v, Tensor)}
    kind = {"rmsprop": "RMSProp", "sgd": "SGD", "adamw": "AdamW"}.get(spec.rule, spec.rule.capitalize())
    given = copy.copy(q)
    if "beta1" in q:
        given["betas"] = given.pop("beta1"), given.pop("beta2")
    flags = {"sgd": "nesterov", "rmsprop": "centered"}
    if spec.rule in flags and spec.rule_flag:
        given[flags[spec.rule]] = True
    if spec.rule == "adagrad" and spec.rule_flag:
        given["initial_accumulator_value"] = 0.1
    return getattr(fm, kind)(**given), learned
