"""What a case is: a network, the shapes and options of one call, and seeded data for it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn

from fastmeta.cases.losses import LOSSES, draw_target
from fastmeta.inputs import Tree, arguments, mapped
from fastmeta.losses import Loss

OPERATORS = ("meta_gradient", "inner_sgd", "task_forward")
RATES = ("scalar", "per_step", "tensor", "rows", "columns", "element", "element_step_task", "head", "zero")


@dataclass(slots=True)
class Instance:
    """The tensors of one case, drawn from one seed, in one dtype; what a field means,
    `fastmeta.problem` says."""

    net: nn.Module
    params: dict[str, Tensor]
    loss: nn.Module | Loss | str
    query_loss: nn.Module | Loss | str | None  # None: the support loss
    support_x: Tree  # [T, N, *in] or [T, K, N, *in], or a tuple of such tensors
    support_y: Tensor
    query_x: Tree  # [T, M, *in]
    query_y: Tensor
    rates: dict[str, Tensor]  # name -> [K or 1, T or 1, *(S or 1s)], as an operator takes them
    per_task: frozenset[str] = frozenset()
    support_weights: Tensor | None = None  # [T, N] or [T, K, N]
    query_weights: Tensor | None = None  # [T, M]
    task_weights: Tensor | None = None  # [T]
    step_weights: tuple[float, ...] | None = None
    support_step_weights: tuple[float, ...] | None = None
    adapted_grad: dict[str, Tensor] | None = None
    output_grad: Tensor | None = None

    def to(self, what: torch.dtype | str) -> Instance:
        """Itself, its floating-point tensors converted to a dtype or all of its tensors moved to a
        device."""
        for entry in fields(self):
            setattr(self, entry.name, _converted(getattr(self, entry.name), what))
        return self


@dataclass(frozen=True)
class Case:
    """One call of one operator: what to build and with which options.

    The same seed gives the same numbers in float32 and in float64: everything is drawn in float32.
    """

    label: str  # network and what is special
    make: Callable[[], nn.Module]
    input_shape: tuple[int, ...]  # one example
    tasks: int = 3
    shots: int = 7
    queries: int = 5
    steps: int = 2
    loss: str = "mse"  # a name in LOSSES
    query_loss: str = ""  # "": the support loss
    operator: str = "meta_gradient"
    order: str = "second"
    lr: float = 0.1
    rates: str = "scalar"
    adapt: tuple[str, ...] = ()  # glob patterns of the parameters that adapt; (): all
    momentum: float = 0.0
    weight_decay: float = 0.0
    rule: str = ""  # a name in `fastmeta.cases.rules`; "": SGD with the numbers above
    step_weights: bool = False  # a weight on the query loss of every step
    support_losses: bool = False  # a weight on the support loss of every step
    weighted: str = (
        ""  # letters of "s" support examples, "q" query examples, "t" tasks; "0": the last task has none
    )
    per_task: str = ""  # "": shared parameters; "all" or "some" have one value a task
    per_step: bool = False  # a support set for each inner step
    memory: str = "auto"
    batch_stats: str = "task"
    kinks: bool = False  # a derivative in use jumps somewhere
    wrt_inputs: bool = True  # gradients to the data are compared too
    ids: int = 0  # inputs are integers below this; 0: floating-point numbers
    # further inputs of floating-point numbers, one example of each: the network is called with all
    more_inputs: tuple[tuple[int, ...], ...] = ()

    @property
    def id(self) -> str:
        """Readable and unique: shapes, label, loss and the options that are not the usual ones."""
        shapes = f"T{self.tasks}-N{self.shots}-M{self.queries}-K{self.steps}"
        options = [
            self.loss + (f"+{self.query_loss}" if self.query_loss else "")
            if self.operator != "task_forward"
            else "",
            self.operator if self.operator != "meta_gradient" else "",
            "first" if self.order == "first" else "",
            f"lr_{self.rates}" if self.rates != "scalar" else "",
            f"mu{self.momentum:g}" if self.momentum else "",
            f"wd{self.weight_decay:g}" if self.weight_decay else "",
            self.rule,
            "step_weights" if self.step_weights else "",
            "support_losses" if self.support_losses else "",
            f"weights_{self.weighted}" if self.weighted else "",
            f"own_{self.per_task}" if self.per_task else "",
            "per_step" if self.per_step else "",
            self.memory if self.memory != "auto" else "",
            f"stats_{self.batch_stats}" if self.batch_stats != "task" else "",
        ]
        return "-".join([self.label, shapes, *filter(None, options)])

    def adapts(self, name: str) -> bool:
        """Whether a parameter adapts in the inner loop, by `adapt`."""
        return not self.adapt or any(fnmatchcase(name, pattern) for pattern in self.adapt)

    def build(self, dtype: torch.dtype = torch.float64, seed: int = 0) -> Instance:
        """The network and the data of this case.

        Args:
            dtype: float32 or float64, of every floating-point tensor.
            seed: of the weights and of the data.

        Returns:
            Fresh tensors that share no memory with another call's.
        """
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            net = self.make().to(torch.float32)
            instance = self._draw(net, torch.Generator().manual_seed(seed + 1))
        return instance.to(dtype)

    def _draw(self, net: nn.Module, generator: torch.Generator) -> Instance:
        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator)

        def positive(*shape: int) -> Tensor:
            return torch.rand(*shape, generator=generator) + 0.5

        def inputs(*lead: int) -> Tree:
            shape = (*lead, *self.input_shape)
            first = torch.randint(self.ids, shape, generator=generator) if self.ids else normal(*shape)
            return (
                (first, *(normal(*lead, *more) for more in self.more_inputs)) if self.more_inputs else first
            )

        tasks, steps = self.tasks, self.steps
        lead = (tasks, steps, self.shots) if self.per_step else (tasks, self.shots)
        with torch.no_grad():
            two = mapped(lambda leaf: leaf.expand(2, *leaf.shape[1:]), inputs(1))
            output_shape = tuple(net(*arguments(two)[0]).shape[1:])
        params = {name: value.detach().clone() for name, value in net.named_parameters()}
        own = [
            name
            for i, name in enumerate(params)
            if self.per_task == "all" or (self.per_task == "some" and i % 2)
        ]
        for name in own:
            params[name] = params[name] * (1 + 0.1 * normal(tasks, *params[name].shape))
        shapes = {name: tuple(value.shape) for name, value in net.named_parameters()}
        adapted = {name: shape for name, shape in shapes.items() if self.adapts(name)}
        query_loss = self.query_loss or self.loss
        instance = Instance(
            net=net,
            params=params,
            loss=LOSSES[self.loss].make(),
            query_loss=LOSSES[self.query_loss].make() if self.query_loss else None,
            support_x=inputs(*lead),
            support_y=draw_target(LOSSES[self.loss].target, lead, output_shape, generator),
            query_x=inputs(tasks, self.queries),
            query_y=draw_target(LOSSES[query_loss].target, (tasks, self.queries), output_shape, generator),
            rates=_draw_rates(self.rates, self.lr, adapted, steps, tasks, positive),
            per_task=frozenset(own),
            support_weights=positive(*lead) if "s" in self.weighted else None,
            query_weights=positive(tasks, self.queries) if "q" in self.weighted else None,
            task_weights=positive(tasks) if "t" in self.weighted else None,
            step_weights=tuple(positive(steps + 1).tolist()) if self.step_weights else None,
            support_step_weights=tuple(positive(steps).tolist()) if self.support_losses else None,
        )
        if "0" in self.weighted:
            for weights in (instance.support_weights, instance.query_weights):
                if weights is not None:
                    weights[-1] = 0
        if self.operator == "inner_sgd":
            instance.adapted_grad = {name: normal(tasks, *shape) for name, shape in shapes.items()}
        if self.operator == "task_forward":
            instance.output_grad = normal(tasks, self.queries, *output_shape)
        return instance


def _draw_rates(
    form: str,
    lr: float,
    shapes: dict[str, tuple[int, ...]],
    steps: int,
    tasks: int,
    positive: Callable[..., Tensor],
) -> dict[str, Tensor]:
    steps = max(steps, 1)
    names = list(shapes)[-2:] if form == "head" else list(shapes)
    per_step = lr * positive(steps)
    rates = {}
    for name in names:
        shape = shapes[name]
        ones = (1,) * len(shape)
        if form in ("scalar", "head"):
            rates[name] = torch.full((1, 1, *ones), lr)
        elif form == "zero":
            rates[name] = torch.zeros(1, 1, *ones)
        elif form == "per_step":
            rates[name] = per_step.clone().reshape(steps, 1, *ones)
        elif form == "tensor":
            rates[name] = lr * positive(1, 1, *ones)
        elif form == "rows":
            rates[name] = lr * positive(1, 1, shape[0], *ones[1:])
        elif form == "columns":
            rates[name] = lr * positive(steps, 1, *ones[:-1], shape[-1])
        elif form == "element":
            rates[name] = lr * positive(1, 1, *shape)
        elif form == "element_step_task":
            rates[name] = lr * positive(steps, tasks, *shape)
        else:
            raise ValueError(f"Case: `rates` must be one of {', '.join(RATES)}, got {form!r}")
    return rates


def _converted(value: Any, what: torch.dtype | str) -> Any:
    if isinstance(value, nn.Module):
        return value.to(what)
    if isinstance(value, Tensor):
        return value.to(what) if isinstance(what, str) or value.is_floating_point() else value
    if isinstance(value, tuple):
        return tuple(_converted(entry, what) for entry in value)
    if isinstance(value, dict):
        return {name: _converted(entry, what) for name, entry in value.items()}
    return value
