"""The tensors, losses and arguments that a drawn input stands for."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from drawing import Spec
from networks import CLASSES, INTEGER_INPUTS, NETWORKS, build
from plain_loop import PlainLoss, batch_norms, custom, uses_batch
from torch import Tensor, nn
from torch.nn import functional as F


class Refused(Exception):
    """This combination has no meaning: nothing is checked."""


@dataclass
class Drawn:
    """The tensors of an input, in its dtype, and the arguments that go with them."""

    net: nn.Module
    params: dict[str, Tensor]
    per_task: frozenset[str]
    adapted: list[str]
    adapt: Any
    lr: Any
    rates: Callable[[Any], dict[str, Tensor]]  # of `lr`, broadcasting to [K, T, *shape]
    support: tuple[Tensor, Tensor, Tensor | None]
    query: tuple[Tensor, Tensor, Tensor | None]
    task_weights: Tensor | None
    step_weights: tuple[float, ...] | None
    support_step_weights: tuple[float, ...] | None


def data_of(spec: Spec) -> Drawn:
    """The input that a spec stands for.

    Raises:
        Refused: it has no meaning.
    """
    net = build(spec.net, spec.width, spec.activation, spec.norm, spec.bias, spec.depth, spec.seed)
    g = torch.Generator().manual_seed(spec.seed)
    if spec.batch_stats == "module":
        for at, norm in enumerate(batch_norms(net)):
            norm.train(bool(spec.seed >> at & 1))
    dtype = getattr(torch, spec.dtype)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=g, dtype=torch.float64)

    names = [name for name, _ in net.named_parameters()]
    if spec.frozen:
        dict(net.named_parameters())[names[0]].requires_grad_(False)
    free = [name for name, value in net.named_parameters() if value.requires_grad]
    adapt, adapted = _adapted(spec, net, names, free)
    if spec.net == "attention" and spec.adapt == "head":
        raise Refused("the last leaf that has parameters is not what the shell calls head")
    shapes = {name: tuple(value.shape) for name, value in net.named_parameters()}
    per_task = frozenset(
        n for i, n in enumerate(names) if spec.per_task == "all" or (spec.per_task and i % 2 == 0)
    )
    params = {}
    for name, value in net.named_parameters():
        own = value.detach().clone()
        if name in per_task:
            own = own * (1 + 0.2 * normal(spec.tasks, *shapes[name]))
        params[name] = _strided(own, "transposed") if spec.param_strides else own
    _, example = NETWORKS[spec.net]

    def inputs(*lead: int) -> Tensor:
        if spec.net in INTEGER_INPUTS:
            return torch.randint(5, (*lead, *example), generator=g)
        return _strided(normal(*lead, *example), spec.strides)

    lead = (spec.tasks, spec.steps, spec.shots) if spec.per_step else (spec.tasks, spec.shots)
    out = (CLASSES, 2) if spec.net == "positions" else (CLASSES,)

    def target(loss: str, *lead: int) -> Tensor:
        if loss in ("cross_entropy", "smoothed", "weighted", "ignoring"):
            y = torch.randint(CLASSES, (*lead, *out[1:]), generator=g)
            if loss == "ignoring" and y[..., 0].numel():
                y.view(-1)[::3] = 1
                y.view(-1)[1::4] = -7
            return _strided(y, spec.strides)
        if loss == "probabilities":
            return normal(*lead, *out).softmax(len(lead))
        y = normal(*lead, *out)
        return _strided(y.sigmoid() if loss == "bce_with_logits" else y, spec.strides)

    def weights(sort: str, *lead: int) -> Tensor | None:
        if not sort:
            return None
        w = torch.rand(lead, generator=g, dtype=torch.float64) + 0.2
        if sort == "float":
            return _strided(w, spec.strides)
        keep = torch.rand(lead, generator=g) < 0.6
        keep[..., 0] = True
        return keep if sort == "mask" else w * keep

    query_loss = spec.query_loss or spec.loss
    support = inputs(*lead), target(spec.loss, *lead), weights(spec.support_weights, *lead)
    query = (
        inputs(spec.tasks, spec.queries),
        target(query_loss, spec.tasks, spec.queries),
        weights(spec.query_weights, spec.tasks, spec.queries),
    )
    lr, rates = _rates(spec, adapted, shapes, g)
    task_weights = (
        torch.rand(spec.tasks, generator=g, dtype=torch.float64) + 0.5 if spec.task_weights else None
    )
    step_weights = (
        tuple(0.0 if k == 1 else 0.3 + k for k in range(spec.steps + 1)) if spec.step_weights else None
    )
    objective = tuple(0.0 if k == 1 else 0.5 / (1 + k) for k in range(spec.steps))
    _check_meaning(spec, net, (support, query))
    drawn = Drawn(
        net,
        params,
        per_task,
        adapted,
        adapt,
        lr,
        rates,
        support,
        query,
        task_weights,
        step_weights,
        objective if spec.support_objective else None,
    )
    return cast(drawn, dtype)


def cast(drawn: Drawn, dtype: torch.dtype) -> Drawn:
    """The same input in a dtype; the module too."""

    def to(value: Any) -> Any:
        if isinstance(value, Tensor):
            return value.to(dtype) if value.is_floating_point() else value
        if isinstance(value, dict):
            return {key: to(item) for key, item in value.items()}
        return value

    if dtype == torch.float64:
        return drawn
    net = copy.deepcopy(drawn.net).to(dtype)
    support, query = tuple(map(to, drawn.support)), tuple(map(to, drawn.query))
    return Drawn(
        net,
        to(drawn.params),
        drawn.per_task,
        drawn.adapted,
        drawn.adapt,
        to(drawn.lr),
        drawn.rates,
        support,
        query,
        to(drawn.task_weights),
        drawn.step_weights,
        drawn.support_step_weights,
    )


def _check_meaning(spec: Spec, net: nn.Module, sets: Any) -> None:
    of_batch = any(uses_batch(norm, spec.batch_stats) for norm in batch_norms(net))
    if spec.norm in ("group", "layer") and spec.width == 1:
        raise Refused("a norm of one value: zero but for rounding, where activations have their kinks")
    unsure = spec.norm != "none" or spec.net == "attention"  # gradients that are zero but for rounding
    if unsure and spec.rule and (spec.rule == "lion" or not spec.rule_root):
        raise Refused("a rule that makes much of the sign of a gradient")
    masks = "mask" in (spec.support_weights, spec.query_weights)
    if of_batch and (masks or 1 in (spec.shots, spec.queries)):
        raise Refused("a batch of one value a channel, or a mask beside batch norm")
    losses = {spec.loss, spec.query_loss or spec.loss}
    if "custom" in losses and (spec.support_weights or spec.query_weights):
        raise Refused("example weights need a loss with a name")
    if spec.per_step and spec.steps == 0:
        raise Refused("no step to have a support set of its own")
    if spec.net == "positions" and "ignoring" in losses:
        raise Refused("a task may have nothing left")
    for _, y, w in sets:
        if "ignoring" in losses and not y.is_floating_point():
            rows = (y != -7) if w is None else (y != -7) & (w != 0)
            if not rows.any(-1).all():
                raise Refused("all targets of a task are ignored")


def _adapted(spec: Spec, net: nn.Module, names: list[str], free: list[str]) -> tuple[Any, list[str]]:
    if spec.adapt == "all":
        return "all", free
    if spec.adapt in ("head", "body"):
        leaves = [module for module in net.modules() if not [*module.children()]]
        last = [leaf for leaf in leaves if [*leaf.parameters()]][-1]
        inside = {id(value) for value in last.parameters()}
        found = [
            n for n, v in net.named_parameters() if n in free and (id(v) in inside) == (spec.adapt == "head")
        ]
    elif spec.adapt == "weights":
        found = [name for name in names if name.endswith("weight")]
        if not found:
            raise Refused("no parameter called weight")
        return ["*weight"], found
    else:
        return (lambda name, value: name == names[0]), names[:1]
    if not found:
        raise Refused("nothing to adapt")
    return spec.adapt, found


def _rates(spec: Spec, adapted: list[str], shapes: dict[str, tuple[int, ...]], g: torch.Generator) -> Any:
    """`lr=` as a user gives it, and the function that makes full rates of it."""
    k, t = max(spec.steps, 1), spec.tasks

    def positive(*shape: int) -> Tensor:
        return 0.05 * (torch.rand(shape, generator=g, dtype=torch.float64) + 0.5)

    def full(value: Any, name: str) -> Tensor:
        value = value if isinstance(value, Tensor) else torch.tensor(value, dtype=torch.float64)
        return value if value.dim() else value.reshape((1, 1, *[1] * len(shapes[name])))

    if spec.rates == "number":
        return 0.05, lambda lr: {name: full(lr, name) for name in adapted}
    if spec.rates == "scalar":
        return positive(), lambda lr: {name: full(lr, name) for name in adapted}
    if spec.rates == "step":
        return positive(spec.steps), lambda lr: {
            name: (lr if len(lr) else lr.new_zeros(1)).reshape(-1, 1, *[1] * len(shapes[name]))
            for name in adapted
        }
    if spec.rates == "pattern":
        others = {"*": 0.03} if len(adapted) > 1 else {}
        return {adapted[0]: positive(), **others}, lambda lr: {
            name: full(lr.get(name, 0.03), name) for name in adapted
        }
    forms = {
        "dict": lambda s: (1, 1, *[1] * len(s)),
        "task": lambda s: (1, t, *[1] * len(s)),
        "element": lambda s: (1, 1, *s),
        "row": lambda s: (1, 1, *s[:1], *[1] * (len(s) - 1)),
        "column": lambda s: (k, 1, *[1] * (len(s) - 1), *s[-1:]),
        "all": lambda s: (k, t, *s),
    }
    return {name: positive(*forms[spec.rates](shapes[name])) for name in adapted}, lambda lr: {
        name: full(lr[name], name) for name in adapted
    }


def _strided(value: Tensor, how: str) -> Tensor:
    """The same values in other memory."""
    if how == "transposed" and value.dim() > 1:
        return value.transpose(0, -1).contiguous().transpose(0, -1)
    if how == "expanded" and value.dim() > 1:
        return value[:1].expand_as(value)
    if how == "sliced":
        wide = torch.zeros(*value.shape[:-1], 2 * value.shape[-1] if value.dim() else 1, dtype=value.dtype)
        if not value.dim():
            return value
        wide[..., ::2] = value
        return wide[..., ::2]
    if how == "flipped" and value.is_floating_point():
        return torch._neg_view(-value)
    if how == "offset":
        return torch.cat([value.new_zeros(3), value.reshape(-1)])[3:].view(value.shape)
    return value


def losses_of(spec: Spec, name: str, dtype: torch.dtype) -> tuple[object, PlainLoss]:
    """A loss as fastmeta takes it, and by itself."""
    mean, norm = spec.reduction == "mean", spec.weight_norm
    weight = torch.tensor([0.5, 2.0, 1.5], dtype=dtype)
    modules: dict[str, tuple[Any, str, dict[str, Any]]] = {
        "mse": (nn.MSELoss, "mse", {}),
        "l1": (nn.L1Loss, "l1", {}),
        "smooth_l1": (nn.SmoothL1Loss, "smooth_l1", {"beta": 0.7}),
        "huber": (nn.HuberLoss, "huber", {"delta": 1.3}),
        "cross_entropy": (nn.CrossEntropyLoss, "cross_entropy", {}),
        "probabilities": (nn.CrossEntropyLoss, "cross_entropy", {}),
        "smoothed": (nn.CrossEntropyLoss, "cross_entropy", {"label_smoothing": 0.1}),
        "weighted": (nn.CrossEntropyLoss, "cross_entropy", {"weight": weight}),
        "ignoring": (nn.CrossEntropyLoss, "cross_entropy", {"ignore_index": -7}),
        "bce_with_logits": (nn.BCEWithLogitsLoss, "bce_with_logits", {}),
    }
    if name == "custom":
        return custom, PlainLoss("custom")
    module, kind, options = modules[name]
    plain = PlainLoss(kind, options, mean, norm)
    if name in ("mse", "l1", "cross_entropy") and mean:
        return {"mse": "mse", "l1": F.l1_loss, "cross_entropy": "cross_entropy"}[name], plain
    return module(reduction=spec.reduction, **options), plain
